"""ReLU in place of GELU and SiLU: what is swapped, what is trained, what stays."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, fx

from tests.compiler.toys import TOKENS, WIDTH
from tests.passes.sparsity.toys import ITEMS, labelled, noise, toy
from thresher.compiler import pipeline
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe
from thresher.passes.learning import training
from thresher.passes.learning.tap import Tapped
from thresher.passes.sparsity import finetune
from thresher.passes.sparsity.relufy import Relufy, RelufyOptions
from thresher.passes.sparsity.sites import find

DATA = Context(data=noise(), batch=6)


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    return Relufy(RelufyOptions(**({"steps": 0} | options)))(program, context)


def activations(program: Program) -> list[fx.Node]:
    targets = (torch.ops.aten.gelu.default, torch.ops.aten.silu.default)
    return [node for node in program.graph.nodes if node.target in targets]


def everything() -> dict[str, Tensor]:
    return {"x": torch.from_numpy(noise().take(range(ITEMS))[0]["x"])}


def weights(program: Program) -> dict[str, Tensor]:
    return dict(program.exported.state_dict)


@pytest.mark.parametrize("kind", ["plain", "gated", "fused"])
@pytest.mark.parametrize("sparsity", [None, 0.8])
def test_it_is_the_model_with_its_activations_cut(kind: str, sparsity: float | None) -> None:
    """Whatever an activation gave before is replaced by ``x if x > t else 0`` of what it read."""
    program = toy(kind, kind)
    result = run(program, sparsity=sparsity)
    assert (result.matched, result.applied, result.refused) == (2, 2, ())
    thresholds = result.details["thresholds"].values()
    assert all(t > 0 for t in thresholds) if sparsity else set(thresholds) == {0.0}
    held: dict[fx.Node, Any] = {}
    for node, t in zip(activations(program), thresholds, strict=True):
        read: list[Tensor] = []
        held[node.all_input_nodes[0]] = lambda x, read=read: read.append(x)
        held[node] = lambda _, read=read, t=t: read[-1] * (read[-1] > t)
    want = Tapped(program).outputs(everything(), held)["output"]
    torch.testing.assert_close(result.program.run(everything())["output"], want)
    assert not activations(result.program)
    assert [f.gated for f in find(result.program).ffns] == [kind != "plain"] * 2


def test_an_activation_of_several_nodes_goes_whole() -> None:
    """SiLU as ``x sigmoid(x)`` is the same network as SiLU as one operator."""
    one, several = (
        run(toy(kind, kind), sparsity=0.8, steps=2).program for kind in ("llama", "spelled")
    )
    torch.testing.assert_close(several.run(everything()), one.run(everything()))
    assert not any("sigmoid" in str(node.target) for node in several.graph.nodes)


def test_the_threshold_leaves_as_much_as_was_asked_for() -> None:
    """In the first network, whose inputs no other threshold changes."""
    program = toy("plain", "plain")
    result = run(program, sparsity=0.7)
    seen: list[Tensor] = []
    ffn = find(result.program).ffns[0]
    Tapped(result.program).outputs(everything(), {ffn.hidden: seen.append})
    assert float((seen[0] == 0).double().mean()) == pytest.approx(0.7, abs=2e-3)


def test_training_moves_the_networks_towards_the_dense_ones_and_nothing_else() -> None:
    program = toy("plain", "gated")
    swapped, trained = run(program), run(program, steps=40, rate=3e-3)
    dense = program.run(everything())["output"]

    def far(result: PassResult) -> float:
        return float((result.program.run(everything())["output"] - dense).norm() / dense.norm())

    assert far(trained) < 0.8 * far(swapped)
    history = trained.details["training"]["history"]
    assert sum(history[-1]) < 0.7 * sum(history[0])
    before, after = weights(program), weights(trained.program)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    own = ("blocks.0.fc1", "blocks.0.fc2", "blocks.1.gate", "blocks.1.up", "blocks.1.down")
    assert moved == {name for name in before if name.startswith(own)}


def test_a_stopped_training_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    program = toy("plain")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("training") and done == 5:
            raise KeyboardInterrupt

    kept = replace(DATA, checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(program, replace(kept, progress=stop), steps=9, sparsity=0.5)
    resumed = run(program, kept, steps=9, sparsity=0.5).program
    whole = run(program, steps=9, sparsity=0.5).program
    pairs = zip(weights(resumed).items(), weights(whole).items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    with pytest.raises(UsageError, match="belongs to another run"):
        run(program, kept, steps=8, sparsity=0.5)


def test_what_is_trained_is_kept_under_the_name_of_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Relufy):
        name = "other"

    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    Other(RelufyOptions(steps=1))(toy("plain"), replace(DATA, checkpoints=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["other.pt"]


def test_it_stops_when_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "_error", lambda y, target: 0 * y.sum())
    program = replace(toy("plain"), info=replace(toy("plain").info, labels=("a", "b", "c", "d")))
    done = run(program, Context(data=labelled(), batch=6), steps=60, patience=5, rate=1e-12)
    assert done.details["training"]["loss"] == "dense"
    assert done.details["training"]["steps"] < 60


def test_labels_are_learned_if_wanted() -> None:
    program = replace(toy("plain"), info=replace(toy("plain").info, labels=("a", "b", "c", "d")))
    done = run(program, Context(data=labelled(), batch=6), steps=2, loss="labels")
    assert done.details["training"]["loss"] == "labels"
    assert math.isfinite(done.details["training"]["history"][0][0])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("normed", "normalises over the neurons"),
        ("shown", "is also read by"),
        ("entwined", "multiplies before its silu is whole"),
    ],
)
def test_others_are_refused(kind: str, said: str) -> None:
    recipe = parse_recipe("passes: [{relufy: {steps: 0}}]", "test")
    with pytest.raises(RefusedError, match=said):
        pipeline.run(toy(kind), recipe, DATA)


def test_a_second_run_changes_nothing() -> None:
    first = run(toy("plain")).program
    second = run(first)
    assert (second.matched, second.applied, second.program) == (1, 0, first)
    assert "is activated by neither GELU nor SiLU" in second.refused[0].reason


def test_explaining_trains_nothing() -> None:
    found = Relufy(RelufyOptions()).explain(toy("plain", "gated"), DATA)
    assert (found.matched, found.applied) == (2, 2)


def test_onnx_runtime_computes_the_same() -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    program = run(toy("plain", "gated"), sparsity=0.6).program
    model = onnx_ir.to_proto(to_onnx(program)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = torch.randn(3, TOKENS, WIDTH)
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), program.run({"x": x})["output"])


def test_too_little_data() -> None:
    with pytest.raises(UsageError, match="training needs at least 5 items"):
        run(toy("plain"), Context(data=noise(3)))
