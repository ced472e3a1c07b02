"""Thresholds: masks are those of the definitions, and a place where they cannot pay is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH
from tests.passes.sparsity.toys import Causal, noise, sentences, toy
from thresher.compiler import pipeline
from thresher.compiler.analysis.cost import parameters, symbol_sizes, total_macs
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import parse_recipe
from thresher.compiler.trace import trace
from thresher.kernels import native
from thresher.kernels.sparse_linear.reference import small
from thresher.passes.learning import calibration
from thresher.passes.learning.tap import Tapped
from thresher.passes.sparsity import insert as inserting
from thresher.passes.sparsity import payoff
from thresher.passes.sparsity.insert import Skip, insert
from thresher.passes.sparsity.sites import find
from thresher.passes.sparsity.skip import Sparsity, SparsityOptions

MANY = 10_000
DATA = Context(data=noise(), batch=5)


def run(program: Program, context: Context = DATA, **options: Any) -> PassResult:
    given = {"allow": True, "most_tokens": MANY} | options
    return Sparsity(SparsityOptions(**given))(program, context)


def causal() -> Program:
    torch.manual_seed(0)
    example = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}
    axes = {"input_ids": {0: "batch", 1: "length"}}
    return trace(Causal(), example, dynamic=axes, info=SourceInfo("toy"))


def seen(program: Program) -> dict[str, Tensor]:
    """Rows of every site over the data."""
    rows: dict[str, Tensor] = {}
    taps = {e.node: (lambda v, n=e.name: rows.update({n: v})) for e in find(program).inputs}
    arrays, _ = noise().take(range(24))
    Tapped(program).outputs({k: torch.from_numpy(v) for k, v in arrays.items()}, taps)
    return {name: value.flatten(0, 1).double() for name, value in rows.items()}


def test_it_fires_at_every_linear() -> None:
    result = run(toy("plain", "plain"), sparsity=0.5)
    assert (result.matched, result.applied) == (8, 8)
    targets = [str(n.target) for n in result.program.graph.nodes]
    assert sum("sparse_linear" in t for t in targets) == 8
    assert sum("aten.linear" in t for t in targets) == 1  # the head
    assert run(toy("plain"), sites=("out", "down")).applied == 2


@pytest.mark.parametrize("method", ["teal", "wina", "scap"])
def test_so_many_inputs_are_skipped(method: str) -> None:
    program = toy("gated", "plain")
    result = run(program, method=method, sparsity=0.4)
    assert result.calibration is not None
    tensors = result.calibration.tensors
    for entry in find(program).inputs:
        rows = seen(program)[entry.name] - float(tensors.get(f"shift.{entry.name}", 0.0))
        threshold = tensors[f"threshold.{entry.name}"]
        share = float((rows.abs() <= threshold).double().mean())
        assert share == pytest.approx(0.4, abs=4e-3)
        if method == "wina":
            squares = [_weight(program, n).square().sum(0) for n in entry.linears]
            norms = torch.stack(squares).sum(0)
            product = threshold * norms.sqrt()
            torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-4, atol=0)


def _weight(program: Program, linear: Any) -> Tensor:
    from thresher.compiler.analysis.linears import weights_of

    return weights_of(program, [linear])[0]


def test_cett_drops_what_the_definition_drops() -> None:
    program = toy("plain")
    result = run(program, method="cett", sparsity=0.6)
    assert result.calibration is not None
    (ffn,) = find(program).ffns
    threshold = result.calibration.tensors["threshold.0.down"]
    sizes = seen(program)["0.down"].abs() * _weight(program, ffn.down).double().norm(dim=0)
    eps = float((threshold * _weight(program, ffn.down).norm(dim=0)).max())
    assert float((sizes < eps).double().mean()) == pytest.approx(0.6, abs=0.02)
    x = torch.randn(2, TOKENS, WIDTH)
    tap = {ffn.hidden: lambda h: torch.where(h.abs() <= threshold, 0.0, h)}
    want = Tapped(program).outputs({"x": x}, tap)["output"]
    torch.testing.assert_close(result.program.run({"x": x})["output"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["teal", "wina", "scap", "cett", "cats"])
def test_masks_are_those_of_the_definition_in_float64(method: str) -> None:
    """What is dropped is smaller than all that is kept, in every tensor."""
    program = toy("gated")
    result = run(program, method=method, sparsity=0.5)
    assert result.calibration is not None
    tensors, (ffn,), values = result.calibration.tensors, find(program).ffns, seen(program)
    if method == "cats":
        arrays, _ = noise().take(range(24))
        assert ffn.gate is not None
        gate = {ffn.gate: lambda v: values.update({"0.down": v.flatten(0, 1).double()})}
        Tapped(program).outputs({"x": torch.from_numpy(arrays["x"])}, gate)
    entries = [e for e in find(program).inputs if f"threshold.{e.name}" in tensors]
    assert len(entries) == (1 if method in ("cett", "cats") else 4)
    for entry in entries:
        shift = tensors.get(f"shift.{entry.name}", torch.zeros(()))
        x = values[entry.name]
        masked = small(x.float() - shift, tensors[f"threshold.{entry.name}"])
        sizes = (x - shift.double()).abs()
        if method in ("wina", "cett"):
            weights = [_weight(program, n).double() for n in entry.linears]
            sizes = sizes * torch.cat(weights).norm(dim=0)
        assert float(sizes[masked].max()) < float(sizes[~masked].min())
        assert float(masked.double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("most", [1, MANY])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("kind", "whole"),
    [("gated", False), ("fused", False), ("llama", True), ("phi", True), ("spelled", True)],
)
def test_cats_drops_by_the_gate_where_there_are_few_tokens(
    kind: str, whole: bool, most: int, dynamic: bool
) -> None:
    program = toy(kind, dynamic=dynamic, pool="mean")
    result = run(program, method="cats", sparsity=0.5, most_tokens=most)
    assert result.calibration is not None
    (ffn,) = find(program).ffns
    found = [
        str(n.target).split(".")[1]
        for n in result.program.graph.nodes
        if "thresher" in str(n.target)
    ]
    assert found == ["sparse_gated_ffn" if whole else "sparse_linear"]
    threshold = result.calibration.tensors["threshold.0.down"]
    gate: list[Tensor] = []
    tapped, x = Tapped(program), torch.randn(2, TOKENS, WIDTH)
    assert ffn.gate is not None
    assert ffn.form is not None
    silu: list[Tensor] = []
    tapped.outputs({"x": x}, {ffn.form.bent.node: silu.append, ffn.gate: gate.append})
    torch.testing.assert_close(gate.pop(), torch.nn.functional.silu(silu[0]))

    def drop(hidden: Tensor) -> Tensor | None:
        return None if most == 1 else torch.where(gate[0].abs() <= threshold, 0.0, hidden)

    want = tapped.outputs({"x": x}, {ffn.gate: gate.append, ffn.hidden: drop})["output"]
    torch.testing.assert_close(result.program.run({"x": x})["output"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cats", "teal"])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_what_few_tokens_are_expected_to_skip_is_no_work(kind: str, method: str) -> None:
    """By the measured union of most_tokens tokens; a prompt is counted whole, and so is the gate of cats."""
    program = toy(kind, dynamic=True, pool="mean")
    sites = ("down",) if method == "cats" else ("up", "down")
    result = run(program, method=method, sites=sites, sparsity=0.5, most_tokens=2)
    needed = {name: shares[2] for name, shares in result.details["union"].items()}
    down = 1 - needed["0.down"]
    skipped = 2 * down if method == "cats" else 2 * (1 - needed["0.up"]) + down
    (ffn,) = find(program).ffns
    for tokens in (1, 2, 3):
        at = symbol_sizes(program, {"batch": 1, "tokens": tokens})
        dense, left = (total_macs(p.graph, sizes=at) for p in (program, result.program))
        matrix = tokens * WIDTH * ffn.width
        saved = skipped * matrix if tokens <= 2 else 0
        assert left == pytest.approx(dense - saved, abs=2)


def test_many_tokens_run_dense_and_few_do_not() -> None:
    program = toy("plain", dynamic=True, pool="mean")
    changed = run(program, sparsity=0.9, most_tokens=4).program
    for tokens, same in ((8, True), (2, False)):
        x = torch.randn(1, tokens, WIDTH)
        dense, skipped = (p.run({"x": x})["output"] for p in (program, changed))
        assert torch.allclose(dense, skipped, rtol=1e-4, atol=1e-5) is same


def test_a_threshold_of_zero_is_dense_to_the_bit() -> None:
    program = toy("plain")
    linears = {e.linears: e.node.meta["val"].shape[-1] for e in find(program).inputs}
    skips = {group: Skip(torch.zeros(width)) for group, width in linears.items()}
    x = torch.randn(2, TOKENS, WIDTH)
    outputs = []
    for most in (0, MANY):
        exported = insert(program, skips, most, "sparsity")
        outputs.append(replace(program, exported=exported).run({"x": x})["output"])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_a_share_of_zero_skips_nothing(method: str) -> None:
    program = toy("gated", "plain")
    result = run(program, method=method, sparsity=0.0)
    assert result.calibration is not None
    tensors = result.calibration.tensors
    assert not any(tensors[name].any() for name in tensors if name.startswith("threshold."))
    x = torch.randn(2, TOKENS, WIDTH)
    dense, skipped = (p.run({"x": x})["output"] for p in (program, result.program))
    torch.testing.assert_close(skipped, dense)


@pytest.mark.parametrize(("kind", "method"), [("plain", "teal"), ("llama", "cats")])
def test_weights_are_kept_in_bfloat16(kind: str, method: str) -> None:
    """Numbers are those of the float32 graph with rounded weights; thresholds are the same."""
    program, x = toy(kind), torch.randn(2, TOKENS, WIDTH)
    wide, narrow = (
        run(program, method=method, sparsity=0.5, weights=w).program
        for w in ("float32", "bfloat16")
    )
    constants = wide.exported.constants
    weights = {k: t for k, t in constants.items() if t.dim() == 2}
    assert len(weights) == (4 if method == "teal" else 3)
    for name, weight in weights.items():
        assert narrow.exported.constants[name].dtype == torch.bfloat16
        constants[name] = weight.bfloat16().float()
    assert torch.equal(*(p.run({"x": x})["output"] for p in (wide, narrow)))


@pytest.mark.parametrize("method", ["teal", "scap"])
def test_short_rows_of_one_input_stand_side_by_side(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up as one operator or as two: the same numbers."""
    program, x, outputs = toy("llama"), torch.randn(2, TOKENS, WIDTH), []
    for short, operators in ((1024, 1), (0, 2)):
        monkeypatch.setattr(inserting, "SHORT", short)
        changed = run(program, sites=("up",), method=method, sparsity=0.5).program
        targets = [str(node.target) for node in changed.graph.nodes]
        assert sum("sparse_linear" in target for target in targets) == operators
        outputs.append(changed.run({"x": x})["output"])
    torch.testing.assert_close(*outputs)


def test_nan_comes_through() -> None:
    result = run(toy("plain"), sparsity=0.5)
    x = torch.randn(1, TOKENS, WIDTH)
    x[0, 3, 2] = torch.nan
    assert result.program.run({"x": x})["output"].isnan().all()


def test_where_it_cannot_pay_it_is_refused_with_the_arithmetic() -> None:
    said = (
        r"takes 10 tokens at once: .* 50% for 1, .* 100% for 64 tokens together; cpu, 10 tokens at"
        r" once: does not pay: .*; use the pass channels"
    )
    with pytest.raises(RefusedError, match=said):
        run(toy("plain", "plain"), sparsity=0.5, allow=False, most_tokens=1)


@pytest.mark.parametrize("built", [False, True])
def test_a_decoder_is_taken(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "wanted", lambda: Path("built") if built else None)
    with pytest.raises(RefusedError, match="cpu, 1 token at once: does not pay"):
        run(causal(), Context(data=sentences(), batch=4), sparsity=0.8, allow=False, most_tokens=1)
    monkeypatch.setattr(payoff, "CALL", 0)  # its matrices are too small for the price of one
    context = Context(data=sentences(), batch=4)
    result = run(causal(), context, sparsity=0.8, allow=False, most_tokens=1)
    assert result.applied == 4
    assert result.details["union"]["0.down"][1] == pytest.approx(0.2, abs=0.03)
    note = result.details.get("note", "")
    assert note.endswith("only with the kernels: thresher kernels build") is not built


@pytest.mark.parametrize("method", ["teal", "cett"])
def test_a_rise_is_met_and_told_beside_that_of_items_held_out(method: str) -> None:
    program, data = toy("plain"), noise(500)
    result = run(program, Context(data=data, batch=125), method=method, rise=5.0, items=250)
    told = result.details
    assert told["rise"] == pytest.approx(5.0, abs=0.05)
    assert told["judged by"] == "error"
    ours, held = calibration.halves(data, 250, 8, 0)
    assert sorted(ours + held) == list(range(500))
    for name, items in (("rise", ours), ("held-out rise", held)):
        arrays, _ = data.take(items)
        x = {key: torch.from_numpy(array) for key, array in arrays.items()}
        dense, found = (p.run(x)["output"].double() for p in (program, result.program))
        error = ((found - dense).norm(dim=1) / dense.norm(dim=1)).mean()
        assert told[name] == pytest.approx(100 * float(error), rel=1e-4)
    assert told["note"].startswith(
        f"error rises by {told['rise']:.2f}% on the 250 items that thresholds were found on and by"
        f" {told['held-out rise']:.2f}% on 250 others"
    )


def test_a_rise_out_of_reach_is_said_to_be_missed() -> None:
    told = run(toy("plain"), method="cett", rise=1e6).details
    assert told["rise"] < 1e6
    assert "(1e+06% was asked: the search found nothing nearer below it)" in told["note"]


def test_weights_that_lose_more_than_the_rise_say_so() -> None:
    told = run(toy("plain"), rise=0.01, weights="bfloat16").details
    assert told["rise"] > 0.06
    assert "so much is lost where nothing is skipped" in told["note"]


def test_a_second_run_changes_nothing() -> None:
    first = run(toy("plain"), sparsity=0.5)
    second = run(first.program, sparsity=0.5)
    assert (second.applied, second.program) == (0, first.program)


@pytest.mark.parametrize("spread", ["even", pytest.param("greedy", marks=pytest.mark.slow)])
def test_a_saved_calibration_makes_the_same_graph(tmp_path: Path, spread: str) -> None:
    program = toy("plain")
    asked: dict[str, Any] = {"sparsity": 0.5, "method": "scap", "spread": spread}
    first, repeated = run(program, **asked), run(program, **asked)
    assert first.calibration is not None
    assert repeated.calibration is not None
    repeated.calibration.write(tmp_path)
    file = tmp_path / first.calibration.file
    made = file.read_bytes()
    first.calibration.write(tmp_path)
    assert file.read_bytes() == made
    again = run(program, Context(), calibration=file, **asked)
    assert again.program.text() == first.program.text()
    for name, tensor in first.program.exported.constants.items():
        assert torch.equal(tensor, again.program.exported.constants[name])
    down = run(program, sites=("down",)).calibration
    assert down is not None
    down.write(tmp_path)
    with pytest.raises(UsageError, match=r"holds nothing for 0\.up: leave the options"):
        run(program, Context(), sites=("up", "down"), calibration=file)
    first.calibration.write(tmp_path)
    with pytest.raises(UsageError, match=r"made with sparsity=0.5 and not sparsity=0.6"):
        run(program, Context(), calibration=file, **asked | {"sparsity": 0.6})
    other = {"even": "greedy", "greedy": "even"}[spread]
    with pytest.raises(UsageError, match=f"made with spread={spread} and not spread={other}"):
        run(program, Context(), calibration=file, **asked | {"spread": other})


@pytest.mark.parametrize(("budget", "answers"), [({"rise": 5.0}, True), ({"sparsity": 0.5}, False)])
def test_a_rise_was_met_with_the_weights_it_was_searched_with(
    tmp_path: Path, budget: dict[str, Any], answers: bool
) -> None:
    program = toy("plain")
    made = run(program, **budget).calibration
    assert made is not None
    made.write(tmp_path)
    asked: dict[str, Any] = {**budget, "weights": "bfloat16", "calibration": tmp_path / made.file}
    if answers:
        with pytest.raises(UsageError, match="made with weights=float32 and not weights=bfloat16"):
            run(program, Context(), **asked)
    else:
        assert run(program, Context(), **asked).applied


def test_two_runs_in_one_recipe_keep_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAVE_EVERY", 1)
    skip = "{sparsity: {sites: [%s], allow: true, most_tokens: 100}}"
    recipe = parse_recipe(f"passes: [{skip % 'out'}, {skip % 'down'}]", "test")
    context = replace(DATA, checkpoints=tmp_path)
    made = pipeline.run(toy("plain"), recipe, context)
    files = [str(record.options["calibration"]) for record in made.history]
    assert files == ["sparsity.safetensors", "sparsity-2.safetensors"]
    kept = {file.name for file in tmp_path.iterdir()}
    assert {"sparsity-sizes.pt", "sparsity-2-sizes.pt"} <= kept


def test_weights_that_a_pass_stored_are_counted_and_hashed() -> None:
    program = toy("plain")
    first, other = (run(program, sites=("down",), sparsity=s).program for s in (0.5, 0.6))
    (ffn,) = find(program).ffns
    assert parameters(first) == parameters(program) + ffn.width  # the threshold
    assert weights_digest(first) != weights_digest(other)


@pytest.mark.parametrize("kind", ["plain", "entwined"])
def test_cats_needs_a_gate(kind: str) -> None:
    result = run(toy(kind), method="cats")
    assert (result.applied, len(result.refused)) == (0, 1)
    assert "has no gate to decide by" in result.refused[0].reason
    with pytest.raises(ValueError, match="method cats is made for sites"):
        SparsityOptions(method="cats", sites=("up",))
