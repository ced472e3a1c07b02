"""Modules are trained against the dense model, kept beside the recipe, and taken from published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.passes.modules.cases import arbitrary, context, toy
from tests.passes.modules.test_mixers import METHODS, method
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import stored_tensors
from thresher.compiler.surgery import Rewriter
from thresher.passes.tokens.modules.method import places

OPTIONS: dict[str, Any] = {"keep": 0.5, "layers": (0, 1), "steps": 30}
each = pytest.mark.parametrize("name", METHODS)


def weights(result: PassResult) -> dict[str, torch.Tensor]:
    assert result.calibration is not None
    return dict(result.calibration.tensors)


@each
def test_training_learns_and_leaves_the_model_alone(name: str) -> None:
    _, program = toy(dtype=torch.float32)
    result = method(name, **OPTIONS, loss="dense")(program, context())
    history = result.details["training"]["history"]
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
    before, after = (stored_tensors(p.exported) for p in (program, result.program))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert len(after) == len(before) + len(weights(result))
    assert "all other weights frozen" in result.details["note"]


@each
def test_the_same_graph_again_without_data(name: str, tmp_path: Path) -> None:
    _, program = toy(dtype=torch.float32)
    first = method(name, **OPTIONS | {"steps": 2})(program, context())
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    kept = tmp_path / first.calibration.file
    again = method(name, **OPTIONS, calibration=kept)(program, Context())
    assert again.program.text() == first.program.text()
    ours, theirs = (stored_tensors(r.program.exported) for r in (again, first))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    with pytest.raises(UsageError, match="was made with tokens=5 3 and not tokens=6 4"):
        method(name, **OPTIONS | {"keep": 0.6}, calibration=kept)(program, Context())
    with pytest.raises(UsageError, match="was made on other weights"):
        method(name, **OPTIONS, calibration=kept)(toy(dtype=torch.float32, seed=2)[1], Context())


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    _, program = toy(dtype=torch.float32)
    whole = method("sit", **OPTIONS | {"steps": 4})(program, context())

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method("sit", **OPTIONS | {"steps": 4})(program, context(tmp_path, progress=stop))
    resumed = method("sit", **OPTIONS | {"steps": 4})(program, context(tmp_path))
    assert all(torch.equal(weights(resumed)[k], t) for k, t in weights(whole).items())
    with pytest.raises(UsageError, match=r"belongs to another run \(steps was 4 and is 5\)"):
        method("sit", **OPTIONS | {"steps": 5})(program, context(tmp_path))


@each
def test_modules_of_the_published_code(name: str, tmp_path: Path) -> None:
    _, program = toy(dtype=torch.float32)
    made = method(name, keep=0.5, layers=(0,))
    (place,) = places(made.plan(program))
    own = arbitrary(made, program)[place.layer]
    keys = made.module.published(place)
    stored = {keys[key]: tensor.clone() for key, tensor in own.items()}
    if name == "sit":  # there one number has three axes
        stored["tsm.0.scale"] = stored["tsm.0.scale"].reshape(1, 1, 1)
    path = tmp_path / "published.safetensors"
    save_file(stored, path)
    result = method(name, keep=0.5, layers=(0,), published=path)(program, Context())
    scale = 16**-0.5 if name == "patch-merger" else 1.0  # logits are scaled there
    for key, tensor in own.items():
        wanted = tensor * scale if key == "queries" else tensor
        torch.testing.assert_close(weights(result)[f"{key}.0"], wanted)
    assert result.options is not None
    assert result.options.model_dump()["published"] is None

    with pytest.raises(
        UsageError, match=r"is \[5, \d+\], and the module behind block 0 needs \[6,"
    ):
        method(name, keep=0.6, layers=(0,), published=path)(program, Context())
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"has no tensor '.*' for the module behind block 0"):
        method(name, keep=0.5, layers=(0,), published=path)(program, Context())
    with pytest.raises(UsageError, match="there is no file"):
        method(name, keep=0.5, published=tmp_path / "none")(program, Context())


def test_two_runs_in_one_recipe_do_not_share_names() -> None:
    _, program = toy(dtype=torch.float32)
    rewriter = Rewriter(program, "twice")
    names = [rewriter.constant("sit_0_first", torch.zeros(1)).name for _ in range(2)]
    assert len(set(names)) == 2
