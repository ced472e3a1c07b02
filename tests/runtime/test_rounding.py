"""Samples on which rounding decides are told apart by the program itself, and excuse nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.compiler.toys import WIDTH, traced
from thresher.compiler.errors import VerdictError
from thresher.compiler.program import PassRecord, Program
from thresher.runtime import ProgramRunner, export, verify
from thresher.runtime.deviation import Deviations, OutputError, tolerance

CHOOSES = PassRecord("a-choice", {}, 1, 1, chooses_tokens=True)
Floats = NDArray[np.float32]


class Chooser(nn.Module):
    """Four of ``[B, N, C]`` tokens.  Those of a sample whose first number is below ``clear`` score 1 up to rounding."""

    def __init__(self, clear: float) -> None:
        super().__init__()
        self.clear = clear
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heavy = x * self.weight
        unit = heavy / heavy.square().sum(-1, keepdim=True).sqrt()
        score = torch.where(x[:, :1, 0] > self.clear, heavy[..., 1], unit.square().sum(-1))
        best = score.topk(4, dim=1).indices
        return heavy.gather(1, best[..., None].expand(-1, -1, WIDTH))


def chooser(clear: float, *, chooses: bool = True) -> Program:
    return dataclasses.replace(
        traced(Chooser(clear), tokens=24), history=(CHOOSES,) if chooses else ()
    )


class Changed:
    """A runner whose outputs are changed afterwards."""

    def __init__(self, runner: ProgramRunner, change: Any) -> None:
        self.runner, self.change = runner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, inputs: Any) -> dict[str, Any]:
        return {name: self.change(inputs["x"], y) for name, y in self.runner.run(inputs).items()}


def judged(clear: float, change: Any = lambda x, y: y, *, chooses: bool = True) -> OutputError:
    """The chooser against one with other roundings whose outputs were changed."""
    reference = ProgramRunner(chooser(clear, chooses=chooses), threads=1)
    other = Changed(reference.rounded(1e-6, seed=99), change)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 24, WIDTH)).astype(np.float32)
    x[:, 0, 0] = np.linspace(-1, 1, 16)
    (error,) = verify(reference, other, inputs=[{"x": x}]).same_function.outputs
    return error


def clear_ones(x: Floats, clear: float) -> Any:
    return (x[:, 0, 0] > clear)[:, None, None]


def test_samples_that_rounding_decides_are_left_out() -> None:
    error = judged(0.0)
    assert (error.samples, error.agreeing, error.undecided) == (8, 8, 8)
    assert error.same
    assert error.relative < 1e-5
    assert not judged(0.0, chooses=False).same, "a model that chooses no tokens has no excuse"


def test_a_third_has_to_agree() -> None:
    assert judged(0.3).same  # 6 of 16
    error = judged(0.5)  # 4 of 16
    assert (error.agreeing, error.undecided) == (4, 12)
    assert not error.same
    assert not error.decided


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: np.where(clear_ones(x, 0.0), y[..., ::-1], y),
        lambda x, y: np.where(clear_ones(x, 0.0), y + np.float32(0.1), y),
        lambda x, y: np.where(clear_ones(x, 0.0), y[:, [1, 0, 2, 3]], y),
        lambda x, y: np.where(clear_ones(x, 0.0), x[:, :4], y),
    ],
    ids=["channels in another order", "values", "tokens in another order", "other tokens"],
)
def test_what_is_wrong_on_decided_samples_is_refused(change: Any) -> None:
    assert not judged(0.0, change).same


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e3], ids=str)
def test_undecided_is_no_excuse_for_every_number(wrong: float) -> None:
    error = judged(0.0, lambda x, y: np.where(clear_ones(x, 0.0), y, np.float32(wrong)))
    assert error.undecided == 0
    assert not error.same


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 3))
@settings(deadline=None)
def test_only_what_differs_in_both_is_left_out(seed: int, count: int, twins: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((count, 3))
    odd, *unstable = rng.integers(0, 2, (twins + 1, count)).astype(bool)
    other = reference + odd[:, None]
    runs = iter([{"y": reference - flips[:, None]} for flips in unstable])
    deviations = Deviations(tolerance("fp32"), discrete=True)
    deviations.add({"y": reference}, {"y": other}, runs)
    (error,) = deviations.results()
    either = np.any([*unstable, np.zeros(count, bool)], axis=0)
    assert error.undecided == (odd & either).sum()
    assert error.samples == count - error.undecided
    assert error.agreeing == (~odd).sum()


def test_no_twin_is_run_where_all_agree() -> None:
    values, runs = {"y": np.ones((2, 3))}, iter([{"y": np.zeros((2, 3))}])
    deviations = Deviations(tolerance("fp32"), discrete=True)
    deviations.add(values, values, runs)
    assert deviations.results()[0].same
    assert next(runs, None) is not None


def test_an_export_says_what_was_left_out(tmp_path: Path) -> None:
    with export(chooser(0.0), tmp_path / "e", threads=1) as engine:
        assert engine.manifest.verified is not None
        told = engine.manifest.verified["outputs"]["output"]
        found = verify(ProgramRunner(chooser(0.0), threads=1), engine)
    assert told["samples"] + told["undecided"] == 16
    assert told["samples"] == told["agreeing"] > 5
    assert found.met
    assert "samples decide nothing: rounding changes the tokens" in found.sentences[0]


def test_an_export_of_which_rounding_decides_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerdictError, match=r"agrees with .* in \d of 16 samples and 33% have to"):
        export(chooser(9.0), tmp_path / "e", threads=1)
    assert list(tmp_path.iterdir()) == []
