"""The pass: items whose answer is sure behind some block leave the model there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler import workers
from thresher.compiler.analysis.branches import blocks, find_branches
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.exits import EXIT, halves, joined
from thresher.compiler.program import Program, Refusal
from thresher.compiler.surgery import Rewriter
from thresher.passes.exits.head import Head, find_head, write_head
from thresher.passes.exits.train import NEVER, HeadTraining, confidence, kept
from thresher.passes.learning import saved
from thresher.passes.learning.options import JudgedBy, Patience, Rate
from thresher.passes.learning.schedule import thinned

THRESHOLD = "exit_threshold"  # the constant of the graph, and its name in ONNX
DEFAULT_DROP = 0.5


class ExitOptions(Options):
    """Where items leave and how sure they must be: at most one of ``threshold`` and ``max_drop``."""

    block: Annotated[
        int | None,
        Field(ge=0, description="items leave behind this block, counted from 0; by default half of the way"),
    ] = None  # fmt: skip
    max_drop: Annotated[
        float | None,
        Field(ge=0, description="points of accuracy that may be lost on data held out; 0.5 by default"),
    ] = None  # fmt: skip
    threshold: Annotated[
        float | None,
        Field(ge=0, description="an item leaves when its largest probability is at least this"),
    ] = None
    steps: Annotated[
        int, Field(ge=0, description="most steps that the exit's head is trained for")
    ] = 200
    rate: Rate = 1e-3
    loss: JudgedBy = "auto"
    patience: Patience = 100
    calibration: Annotated[
        Path | None, Field(description="a head trained before, instead of a training")
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> ExitOptions:
        if self.threshold is not None and self.max_drop is not None:
            raise ValueError("give one of threshold and max_drop, and null for the other")
        return self


@dataclass(frozen=True)
class Found:
    """A head for an exit: its weights, the threshold, and the share that leaves and what it loses, if known."""

    weights: Mapping[fx.Node, Tensor]
    threshold: float
    share: float
    lost: float
    training: dict[str, Any]


class EarlyExit(Pass[ExitOptions]):
    """A second head behind a block; an item that it is sure of gets its answer from there.

    As in DeeBERT (Xin et al., ACL 2020), with the largest probability for a measure.  The head is the model's own
    (what stands between its last block and the output), trained behind the earlier block; the model is frozen.
    Whole, the graph computes both answers and takes one; ``export`` cuts it in two, of which a host runs
    the second for those that go on.
    """

    name = "early-exit"
    summary = (
        "let items that a second head is sure of leave behind a block: two graphs in one engine"
    )
    Options = ExitOptions
    needs_data: ClassVar[bool] = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """Whether the model has a place for an exit; no training."""
        place = self._place(program)
        if isinstance(place, Refusal):
            return PassResult(program, 1, 0, (place,))
        return PassResult(program, 1, 1)

    def run(self, program: Program, context: Context) -> PassResult:
        place = self._place(program)
        if isinstance(place, Refusal):
            return PassResult(program, 1, 0, (place,))
        block, early, head = place
        digest = weights_digest(program)
        with workers.joined():
            found = self._found(program, early, head, context, digest)
        exported = _insert(program, early, head, found, self.name)
        result = replace(program, exported=exported)
        first, rest = (total_macs(half.graph) for half in _parts(result))
        dense, macs = total_macs(program.graph), round(first + (1 - found.share) * rest)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        tensors = {
            **kept(found.weights),
            **{f"{name}.head": torch.tensor(value, dtype=torch.float64) for name, value in
               (("share", found.share), ("lost", found.lost), ("threshold", found.threshold))},
        }  # fmt: skip
        told = f"{found.share:.1%} of the items leave behind block {block} where they are {found.threshold:.3f} sure"
        decided = {
            "calibration": Path(file),
            "block": block,
            "threshold": found.threshold,
            "max_drop": None,
        }
        return PassResult(
            result, 1, 1, (),
            {
                "dense_macs": dense, "macs": macs, "ideal": dense / macs,
                "block": block, "threshold": found.threshold, "share": found.share,
                "points_lost": found.lost, "macs_of_graphs": [first, rest], "training": found.training,
                "note": f"{told}, which loses {found.lost:.2f} points, on data that neither training nor threshold saw",
            },
            self.options.model_copy(update=decided),
            Calibration(file, digest, tensors, {"block": str(block)}),
        )  # fmt: skip

    def _place(self, program: Program) -> tuple[int, fx.Node, Head] | Refusal:
        """The block, the stream behind it, and the model's head."""
        if joined(program) is not None:
            return Refusal("(graph)", "items leave already: start from the original model")
        outputs = program.output_nodes()
        if len(outputs) != 1 or outputs[0].meta["val"].dim() != 2:
            return Refusal(
                "(graph)", "the model does not answer with one vector of classes for each item, so there is nothing"
                " to be sure of",
            )  # fmt: skip
        parts = blocks(find_branches(program))
        if len(parts) < 2:
            return Refusal("(graph)", "the model has no two blocks to leave between")
        block = len(parts) // 2 - 1 if self.options.block is None else self.options.block
        if block >= len(parts) - 1:
            raise UsageError(
                f"block={block} is no place to leave early: the model has {len(parts)} blocks, so give 0 to"
                f" {len(parts) - 2}"
            )
        early, last = (part.spans[-1][1] for part in (parts[block], parts[-1]))
        head = find_head(program, last, early)
        return head if isinstance(head, Refusal) else (block, early, head)

    def _found(
        self, program: Program, early: fx.Node, head: Head, context: Context, digest: str
    ) -> Found:
        options = self.options
        known = None if options.calibration is None else self._restored(head, digest)
        if (
            known is not None
            and options.max_drop is None
            and options.threshold in (None, known.threshold)
        ):
            return known
        if context.data is None:
            raise UsageError(
                f"pass {self.name!r}: how many items leave at another threshold is measured on data: add --learn-data"
                " DATA"
            )
        name = saved.numbered(program, self.name)
        training = HeadTraining(program, head, early, options, context, name)
        if known is None:
            training.run()
        else:
            training.weights.update(known.weights)
        judged = training.judged()
        half = (len(judged.confidence) + 1) // 2
        threshold = options.threshold
        if threshold is None:
            drop = DEFAULT_DROP if options.max_drop is None else options.max_drop
            threshold = judged.part(slice(half)).threshold(drop)
            if threshold == NEVER:
                raise VerdictError(
                    f"no item can leave behind {early.name} where {drop:g} points may be lost: allow more (max_drop),"
                    " train longer (steps), or name a later block"
                )
        share, lost = judged.part(slice(half, None)).at(threshold)
        told = {
            "loss": training.loss_name, "steps": len(training.history),
            "history": thinned(training.history), "right_early": float(judged.early.double().mean()),
            "right_late": float(judged.late.double().mean()),
        }  # fmt: skip
        return Found(training.weights, threshold, share, lost, told)

    def _restored(self, head: Head, digest: str) -> Found:
        """A head that was trained before, at its threshold.

        Raises:
            UsageError: the file is not of this model and block.
        """
        path, names = self.options.calibration, [node.name for node in head.weights]
        assert path is not None
        facts = {"block": str(self.options.block)}
        found = saved.read(path, digest, self.name, names, facts)
        threshold, share, lost = (
            float(found[f"{name}.head"]) for name in ("threshold", "share", "lost")
        )
        weights = {node: found[f"head.{node.name}"] for node in head.weights}
        return Found(weights, threshold, share, lost, {})


def _parts(program: Program) -> tuple[Program, Program]:
    cut = halves(program)
    return cut.first, cut.rest


def _insert(
    program: Program, early: fx.Node, head: Head, found: Found, made_by: str
) -> ExportedProgram:
    """The graph that computes both answers and takes one for each item."""
    rewriter = Rewriter(program, made_by)
    constants = {f"exit_{node.name}": t.detach() for node, t in found.weights.items()}
    constants[THRESHOLD] = torch.tensor(found.threshold, dtype=torch.float32)
    inputs, made, answer = set(program.input_nodes()), dict[str, fx.Node](), None
    leaves: fx.Node | None = None
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node in inputs and not made:
            made = {name: rewriter.constant(name, tensor) for name, tensor in constants.items()}
        rewriter.copy(node)
        if node is early:
            rewriter.at(early)
            weights = {n: made[f"exit_{n.name}"] for n in found.weights}
            answer = write_head(rewriter, head, early, weights)
            leaves = rewriter.inline(
                lambda logits, least: confidence(logits) >= least, answer, made[THRESHOLD]
            )
    (output,) = program.output_nodes()
    assert answer is not None
    assert leaves is not None
    rewriter.at(output)
    column = rewriter.emit(torch.ops.aten.unsqueeze.default, leaves, 1)
    rewriter.at(output, **{EXIT: True})
    joined = rewriter.emit(torch.ops.aten.where.self, column, answer, rewriter.map[output])
    return rewriter.finish([joined], constants)
