"""Greedy allocation: the steps of its definition in float64, resumed by block, never worse than even here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.toys import Toy, traced
from tests.passes.sparsity.toys import BLOCKS, ITEMS, noise, toy
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.passes.sparsity.allocation import STEP, Greedy
from thresher.passes.sparsity.blocks import blocks
from thresher.passes.sparsity.sites import find
from thresher.passes.sparsity.skip import Sparsity, SparsityOptions
from thresher.passes.sparsity.thresholds import Thresholds

KINDS, UNTIL = ("gated", "plain"), 0.5
READERS = {  # by kind of the block and of the input: the linears that read it
    "gated": {"qkv": ["qkv"], "out": ["proj"], "up": ["gate", "up"], "down": ["down"]},
    "plain": {"qkv": ["qkv"], "out": ["proj"], "up": ["fc1"], "down": ["fc2"]},
}


def measured(program: Program, context: Context, method: str = "teal") -> tuple[Thresholds, Greedy]:
    found, items = find(program), range(ITEMS)
    known = Thresholds(program, context, method, False, found.ffns, found.inputs, items, {})
    greedy = Greedy(
        program, context, found.ffns, found.inputs, known.skip, UNTIL, items, {"method": method}
    )
    return known, greedy


class Oracle:
    """The same model in float64, masked by hooks, one block at a time on its dense input."""

    def __init__(self, model: Toy, known: Thresholds, x: Tensor) -> None:
        self.model, self.known = deepcopy(model).double(), known
        self.entries = {entry.name: entry for entry in known.inputs}
        self.inputs: list[Tensor] = []
        for block in self.model.blocks:
            block.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0]))
        with torch.no_grad():
            self.model(x.double())

    def error(self, number: int, shares: Mapping[str, float]) -> float:
        block, x = self.model.blocks[number], self.inputs[number]
        with torch.no_grad():
            want = block(x)
            handles = [
                block.get_submodule(name).register_forward_pre_hook(
                    self._mask(f"{number}.{kind}", s)
                )
                for kind, s in shares.items()
                for name in READERS[KINDS[number]][kind]
            ]
            found = block(x)
            for handle in handles:
                handle.remove()
        return float(((found - want).norm(dim=-1) / want.norm(dim=-1)).mean())

    def _mask(self, name: str, share: float) -> Callable[..., Tensor]:
        skip = self.known.skip(self.entries[name], share)
        limit, shift = skip.threshold.double(), skip.shift
        return lambda _, given: torch.where((given[0] - shift).abs() <= limit, shift, given[0])

    def path(self, number: int) -> list[dict[str, float]]:
        """Shares after each step, by the definition."""
        block, readers = self.model.blocks[number], READERS[KINDS[number]]
        sizes = {
            kind: sum(block.get_parameter(f"{name}.weight").numel() for name in names)
            for kind, names in readers.items()
        }
        mean, whole = sum(sizes.values()) / len(sizes), sum(sizes.values())
        path = [dict.fromkeys(sizes, 0.0)]
        while sum(path[-1][kind] * size for kind, size in sizes.items()) / whole < UNTIL:
            tried = [
                path[-1] | {kind: min(1.0, path[-1][kind] + STEP * mean / size)}
                for kind, size in sizes.items()
                if path[-1][kind] < 1
            ]
            path.append(min(tried, key=lambda shares: self.error(number, shares)))
        return path


def model_of(*kinds: str) -> Toy:
    torch.manual_seed(3)
    made = Toy(*(BLOCKS[kind]() for kind in kinds))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("method", ["teal", "wina", "scap"])
def test_steps_are_those_of_the_definition(method: str) -> None:
    model = model_of(*KINDS)
    program = traced(model)
    known, greedy = measured(program, Context(data=noise(), batch=7), method)
    oracle = Oracle(model, known, torch.from_numpy(noise().take(range(ITEMS))[0]["x"]))
    even = greedy.errors({entry.name: 0.4 for entry in known.inputs})
    for number, (block, path) in enumerate(zip(greedy.blocks, greedy.paths, strict=True)):
        kinds = [entry.kind for entry in block.inputs]
        want = torch.tensor([[row[kind] for kind in kinds] for row in oracle.path(number)])
        torch.testing.assert_close(path.float(), want)
        assert even[number] == pytest.approx(
            oracle.error(number, dict.fromkeys(kinds, 0.4)), rel=1e-4
        )


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_it_moves_the_blocks_less_than_the_same_share_everywhere(method: str) -> None:
    program = toy(*KINDS)
    _, greedy = measured(program, Context(data=noise(), batch=7), method)
    for amount in (0.1, 0.33, UNTIL):
        shares = greedy.at(amount)
        for entries in (block.inputs for block in greedy.blocks):
            weights = sum(entry.weights for entry in entries)
            mean = sum(shares[entry.name] * entry.weights for entry in entries) / weights
            assert mean == pytest.approx(amount)
        both = zip(greedy.errors(shares), greedy.errors(dict.fromkeys(shares, amount)), strict=True)
        assert all(ours <= even for ours, even in both)
    assert set(greedy.at(0.0).values()) == {0.0}


def test_what_leads_to_no_network_gets_the_asked_share() -> None:
    found = find(toy("plain", "normed"))
    made, alone = blocks(found.ffns, found.inputs)
    assert [[entry.name for entry in block.inputs] for block in made] == [
        ["0.qkv", "0.out", "0.up", "0.down"]
    ]
    assert [entry.name for entry in alone] == ["1.qkv", "1.out"]
    _, greedy = measured(toy("plain", "normed"), Context(data=noise(), batch=7))
    assert {greedy.at(0.3)[entry.name] for entry in alone} == {0.3}


def skip(context: Context, **options: object) -> PassResult:
    given = {"spread": "greedy", "sparsity": 0.4, "allow": True, "most_tokens": 10_000} | options
    return Sparsity(SparsityOptions.model_validate(given))(toy(*KINDS), context)


@pytest.mark.slow
def test_an_interrupted_search_goes_on_with_the_next_block(tmp_path: Path) -> None:
    tried: list[int] = []

    def stop(what: str, done: int, _: int) -> None:
        if what == "sharing out":
            tried.append(done)
            if tried == [0, 1]:
                raise KeyboardInterrupt

    context = Context(data=noise(), batch=7)
    whole = skip(context)
    kept = replace(context, checkpoints=tmp_path, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        skip(kept)
    resumed = skip(kept)
    assert tried == [0, 1, 1]
    assert whole.calibration is not None
    assert resumed.calibration is not None
    assert resumed.details["shares"] == whole.details["shares"]
    for name, tensor in whole.calibration.tensors.items():
        assert torch.equal(tensor, resumed.calibration.tensors[name])


@pytest.mark.parametrize("other", [{"data": replace(noise(), name="other")}, {"batch": 8}])
def test_shares_of_another_run_are_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    context = Context(data=noise(), batch=7, checkpoints=tmp_path)
    skip(context)
    with pytest.raises(UsageError, match=rf"belongs to another run \({next(iter(other))} was"):
        skip(replace(context, **other))


@pytest.mark.slow
def test_a_rise_is_met_by_greedy_shares() -> None:
    result = skip(Context(data=noise(512), batch=128), sparsity=None, rise=20.0, items=256)
    assert result.details["rise"] == pytest.approx(20.0, abs=0.05)
    errors = result.details["block error"]
    assert errors["greedy"] < errors["even"]


def test_one_input_in_a_block_has_nothing_to_spread() -> None:
    with pytest.raises(ValueError, match="method cett has one input in a block: nothing to spread"):
        SparsityOptions(method="cett", spread="greedy")
