"""A whole vision transformer whose feed-forward networks are adaptive: time only, at several mean budgets.

Weights are random and the gates are trained for some steps on noise, which tells how much runs (the budget is met on
items held out) and nothing about quality.

    python -m tests.benchmarks.adaptive_vit [--model deit_small_patch16_224] [--budgets 0.25 0.5 0.75] [--batch 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.adaptive import Trained, Trainer
from tests.benchmarks.common import Study, parser
from tests.benchmarks.report import finish
from thresher.compiler.contract import Context
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.compiler.variants import CONTROL, DENSE, Variant
from thresher.models.data import Dataset
from thresher.runtime import compare
from thresher.runtime.conditions import load_average

ITEMS, BATCH = 256, 8  # of training


def vision_transformer(name: str) -> Program:
    """A timm model with random weights at its own size, any batch."""
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval()
    size = model.pretrained_cfg["input_size"]
    return trace(
        model,
        {"x": torch.zeros(2, *size)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo(f"timm:{name}", "random"),
    )


def noise(program: Program) -> Dataset:
    """Normal numbers in the shape of the model's input, the same for the same item."""
    (spec,) = program.inputs
    shape = tuple(int(str(size)) for size in spec.shape[1:])

    def read(chosen: Sequence[int]) -> dict[str, NDArray[Any]]:
        images = [np.random.default_rng(i).standard_normal(shape, np.float32) for i in chosen]
        return {spec.name: np.stack(images)}

    return Dataset("noise", ITEMS, None, read)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=0)
    options.set_defaults(budgets=[0.25, 0.5, 0.75])
    options.add_argument("--model", default="deit_small_patch16_224", help="of timm")
    options.add_argument("--trained", type=float, default=0.5, help="budget of the one training")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    load, dense = load_average(), vision_transformer(args.model)
    steps = {"distil_steps": 4, "gate_steps": 8, "steps": 8}
    trained = Trained("acm", {"budget": args.trained, **steps})
    trainer = Trainer(dense, Context(data=noise(dense), batch=BATCH))
    rows = list(trainer.rows("acm", (), trained, args.budgets))
    found = compare(
        [Variant(DENSE, program=dense, share=1.0), *rows],
        None,
        control=CONTROL,
        threads=args.threads,
        batch=args.batch or 1,
        rounds=args.rounds,
        load=load,
    )
    notes = ["random weights, gates trained on noise", *(f"{row.name}: {row.note}" for row in rows)]
    finish([Study(f"Adaptive feed-forward networks in {args.model}", found, notes)], args)


if __name__ == "__main__":
    main()
