"""Static channel sets: smaller linears that compute what a masked model would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH
from tests.passes.sparsity.toys import HIDDEN, ITEMS, noise, toy
from thresher.compiler import pipeline
from thresher.compiler.analysis.linears import LINEAR
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.lowering.prepare import prepare
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe
from thresher.passes.learning.tap import Tapped
from thresher.passes.sparsity.channels import ChannelOptions, ChannelPruning
from thresher.passes.sparsity.sites import find

DATA = Context(data=noise(), batch=5)


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    return ChannelPruning(ChannelOptions(**options))(program, context)


def hidden_rows(program: Program) -> list[Tensor]:
    """``[T, H]`` float64 of every network over the data, the long way."""
    rows: dict[int, list[Tensor]] = {}
    taps = {f.hidden: rows.setdefault(f.layer, []).append for f in find(program).ffns}
    arrays, _ = noise().take(range(ITEMS))
    Tapped(program).outputs({k: torch.from_numpy(v) for k, v in arrays.items()}, taps)
    return [torch.cat(r).flatten(0, 1).double() for r in rows.values()]


@pytest.mark.parametrize("kind", ["plain", "gated", "fused"])
@pytest.mark.parametrize("fold", [True, False])
def test_it_equals_the_model_with_neurons_held_at_their_mean(kind: str, fold: bool) -> None:
    program = toy(kind, kind)
    result = run(program, ratio=0.25, fold=fold)
    assert (result.matched, result.applied) == (2, 2)
    assert [tuple(n) for n in result.details["neurons"].values()] == [(HIDDEN, 24)] * 2
    held: dict[Any, Any] = {}
    for ffn, rows in zip(find(program).ffns, hidden_rows(program), strict=True):
        gone = rows.var(0, correction=0).argsort()[: HIDDEN - 24]
        stand = rows.mean(0) if fold else torch.zeros(HIDDEN)

        def hold(value: Tensor, gone: Tensor = gone, stand: Tensor = stand) -> Tensor:
            value = value.clone()
            value[..., gone] = stand[gone].to(value.dtype)
            return value

        held[ffn.hidden] = hold
    x = torch.randn(3, TOKENS, WIDTH)
    want = Tapped(program).outputs({"x": x}, held)["output"]
    have = result.program.run({"x": x})["output"]
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert result.details["macs"] < result.details["dense_macs"]
    assert find(result.program).ffns[0].width == 24


def test_inputs_are_gathered_once_and_fold_too() -> None:
    program = toy("gated")
    result = run(program, ratio=0.0, inputs=0.5)
    picks = [n for n in result.program.graph.nodes if "index_select" in str(n.target)]
    assert len(picks) == 1
    assert result.applied == 1
    rows: list[Tensor] = []
    (entry,) = (e for e in find(program).inputs if e.kind == "up")
    arrays, _ = noise().take(range(ITEMS))
    inputs = {k: torch.from_numpy(v) for k, v in arrays.items()}
    Tapped(program).outputs(inputs, {entry.node: rows.append})
    flat = torch.cat(rows).flatten(0, 1).double()
    gone = flat.var(0, correction=0).argsort()[: WIDTH // 2]

    def hold(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., gone] = flat.mean(0)[gone].float()
        return value

    x = torch.randn(2, TOKENS, WIDTH)
    want = Tapped(program).outputs({"x": x}, {entry.node: hold})["output"]
    torch.testing.assert_close(result.program.run({"x": x})["output"], want, rtol=1e-4, atol=1e-5)


def test_cut_linears_are_half_in_float16() -> None:
    cut = run(toy("plain", "gated"), ratio=0.25, inputs=0.25).program
    linears = [n for n in prepare(cut, "fp16").graph.nodes if n.target is LINEAR]
    assert len(linears) == 10
    assert {n.meta["val"].dtype for n in linears} == {torch.float16}


def test_a_dynamic_length_stays() -> None:
    result = run(toy("plain", dynamic=True, pool="mean"), ratio=0.5)
    for tokens in (3, 17):
        assert result.program.run({"x": torch.randn(2, tokens, WIDTH)})["output"].shape == (2, 4)


def test_a_second_run_changes_nothing() -> None:
    first = run(toy("plain"), ratio=0.5)
    second = run(first.program, ratio=0.5)
    assert (second.matched, second.applied, second.program) == (1, 0, first.program)
    assert "was cut already" in second.refused[0].reason


@pytest.mark.parametrize("spread", ["even", "free"])
def test_a_budget_is_met_and_never_exceeded(spread: str) -> None:
    details = run(toy("plain", "plain"), flops=0.8, spread=spread, multiple=2).details
    assert 0.74 < details["macs"] / details["dense_macs"] <= 0.8
    assert all(left % 2 == 0 for _, left in details["neurons"].values())


def test_what_cannot_be_met_is_a_verdict() -> None:
    with pytest.raises(VerdictError, match=r"flops=0.2 cannot be met: .* is left without them"):
        run(toy("plain"), flops=0.2)


@pytest.mark.parametrize(
    ("context", "said"),
    [
        (Context(), "needs data and none was given"),
        (Context(data=noise(3)), "has 3 items and calibration needs at least 8"),
        (Context(data=noise(value=float("nan"))), "values that are no finite numbers"),
    ],
)
def test_data_that_will_not_do(context: Context, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(toy("plain"), context)


def test_a_model_without_networks_is_refused() -> None:
    recipe = parse_recipe("passes: [channels]", "test")
    with pytest.raises(RefusedError, match="normalises over the neurons"):
        pipeline.run(toy("normed"), recipe, DATA)


def weights(program: Program) -> Mapping[str, Tensor]:
    return {**program.exported.state_dict, **program.exported.constants}


def test_a_saved_calibration_makes_the_same_graph(tmp_path: Path) -> None:
    program = toy("fused")
    first = run(program, ratio=0.4)
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    file = tmp_path / first.calibration.file
    again = run(program, Context(), ratio=0.4, calibration=file)
    assert again.calibration is not None
    again.calibration.write(tmp_path / "..")
    assert file.read_bytes() == (tmp_path.parent / file.name).read_bytes()
    assert first.program.text() == again.program.text()
    pairs = zip(weights(first.program).items(), weights(again.program).items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    with pytest.raises(UsageError, match=r"holds nothing for 0\.up: leave the options"):
        run(program, Context(), ratio=0.4, inputs=0.5, calibration=file)
    with torch.no_grad():
        other = toy.__wrapped__("fused")
        next(iter(v for k, v in weights(other).items() if "both.weight" in k)).add_(1e-3)
    with pytest.raises(UsageError, match="was made on other weights than these"):
        run(other, Context(), ratio=0.4, calibration=file)
    with pytest.raises(UsageError, match=r"there is no calibration .* and calibration=null"):
        run(program, Context(), calibration=tmp_path / "none")
    file.write_bytes(b"no")
    with pytest.raises(UsageError, match="is no calibration that can be read"):
        run(program, Context(), calibration=file)


def test_it_goes_with_token_merging() -> None:
    text = "passes: [{channels: {ratio: 0.25}}, {tome: {r: 2}}]"
    made = pipeline.run(toy("plain", "plain"), parse_recipe(text, "test"), DATA)
    assert [record.applied for record in made.history] == [2, 2]
    assert made.history[1].details["dense_macs"] == made.history[0].details["macs"]
    assert made.run({"x": torch.randn(2, TOKENS, WIDTH)})["output"].shape == (2, 4)


def test_a_stopped_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.passes.learning import calibration

    monkeypatch.setattr(calibration, "SAVE_EVERY", 1)

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    program, context = toy("plain"), replace(DATA, checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(program, replace(context, progress=stop))
    seen: list[int] = []
    resumed = run(program, replace(context, progress=lambda _, done, __: seen.append(done)))
    assert seen[0] == 3
    whole = run(program)
    assert resumed.calibration is not None
    assert whole.calibration is not None
    for name, tensor in whole.calibration.tensors.items():
        assert torch.equal(tensor, resumed.calibration.tensors[name])
