"""Side-by-side measurement on made-up clocks; engines only where files or processes matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import toys
from thresher.compiler.errors import UsageError
from thresher.runtime.candidates import Candidate, disk_size
from thresher.runtime.conditions import conditions, default_threads, usable_cores
from thresher.runtime.measure import Plan
from thresher.runtime.profiling import Profile, ideal_ratio, profile
from thresher.runtime.report import write_report
from thresher.runtime.runner import Runnable


class Lab:
    """A clock, and runnables that move it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.load = 1.0

    def clock(self) -> float:
        return self.now

    def runnable(self, name: str, seconds: Callable[[int], float], *, reduced: bool = False) -> Any:
        fake = toys.Fake(name, reduced=reduced)
        count = iter(range(10**6))

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            self.now += seconds(next(count)) * len(inputs["x"])
            return {"logits": inputs["x"]}

        fake.run = run  # type: ignore[method-assign]
        return fake

    def profile(self, *runnables: Runnable, **options: Any) -> Profile:
        return profile(
            runnables,
            threads=1,
            plan=Plan(rounds=10),
            memory=False,
            clock=self.clock,
            **options,
        )


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_a_gain_is_told_with_its_interval(lab: Lab) -> None:
    dense = lab.runnable("dense", lambda i: 0.2 + 0.001 * (i % 3))
    fast = lab.runnable("fast", lambda i: 0.1, reduced=True)
    found = lab.profile(dense, fast, batches=[1, 4])
    timing = found.timing("fast", 4)
    assert timing.latency.median == pytest.approx(0.4)
    assert timing.throughput == pytest.approx(10)
    assert timing.speedup is not None
    assert timing.speedup.median == pytest.approx(2.01, abs=0.02)
    assert found.timing("dense", 1).speedup is None
    assert found.sentences[1].startswith("batch 4: fast is 2.01 times as fast as dense (98% interv")


def test_no_difference_is_called_noise(lab: Lab) -> None:
    dense = lab.runnable("dense", lambda i: 0.1 + 0.01 * (i % 5))
    same = lab.runnable("same", lambda i: 0.1 + 0.01 * (i % 7))
    found = lab.profile(dense, same, min_speedup=1.01)
    said = next(said for said in found.sentences if "no gain over dense" in said)
    assert said.endswith("is noise; 1.01 times was demanded")
    assert not found.met


@pytest.mark.parametrize(("least", "met"), [(None, True), (1.9, True), (2.1, False)])
def test_a_demanded_speed_up(lab: Lab, least: float | None, met: bool) -> None:
    dense, fast = lab.runnable("dense", lambda i: 0.2), lab.runnable("fast", lambda i: 0.1)
    found = lab.profile(dense, fast, min_speedup=least)
    assert found.met is met
    assert ("was demanded" in found.sentences[0]) is not met


def test_slower_is_said(lab: Lab) -> None:
    dense, slow = lab.runnable("dense", lambda i: 0.1), lab.runnable("slow", lambda i: 0.2)
    assert "slow is slower than dense: 0.50" in lab.profile(dense, slow).sentences[0]


def test_unsteady_warm_up_is_said(lab: Lab) -> None:
    wild = lab.runnable("wild", lambda i: 0.1 * (1 + i % 2))
    assert any("did not become steady in 30 runs" in said for said in lab.profile(wild).sentences)


def test_names_are_told_apart(lab: Lab) -> None:
    runs = [lab.runnable("same", lambda i: 0.1) for _ in range(3)]
    assert [c.name for c in lab.profile(*runs).candidates] == ["same", "same #2", "same #3"]


def test_unlike_models_are_refused(lab: Lab) -> None:
    other = lab.runnable("other", lambda i: 0.1)
    other.inputs = (other.inputs[0].model_copy(update={"name": "pixels"}),)
    with pytest.raises(UsageError, match="other has the input 'pixels'"):
        lab.profile(lab.runnable("a", lambda i: 0.1), other)
    with pytest.raises(UsageError, match="nothing to profile"):
        lab.profile()


def test_a_model_of_another_size_gets_inputs_of_its_own(lab: Lab) -> None:
    given = list[tuple[int, ...]]()
    long, short = lab.runnable("long", lambda i: 0.4), lab.runnable("short", lambda i: 0.1)
    short.inputs = (short.inputs[0].model_copy(update={"shape": ("batch", 4)}),)
    run = short.run

    def watched(inputs: Mapping[str, Any]) -> Any:
        given.append(inputs["x"].shape)
        return run(inputs)

    short.run = watched
    found = lab.profile(long, short, batches=[2])
    assert set(given) == {(2, 4)}
    assert found.timing("short", 2).speedup.median == pytest.approx(4)  # type: ignore[union-attr]
    assert found.sentences[-1] == "short was given 'x' of [2, 4], long of [2, 10]"


def test_a_fixed_batch_is_named(lab: Lab) -> None:
    fixed = lab.runnable("fixed", lambda i: 0.1)
    fixed.inputs = (fixed.inputs[0].model_copy(update={"shape": (4, 10)}),)
    with pytest.raises(UsageError, match="fixed has a fixed batch of 4, not 1: use --batch 4"):
        lab.profile(fixed, batches=[1])


def test_other_thread_counts_are_refused(lab: Lab) -> None:
    run = lab.runnable("run", lambda i: 0.1)
    run.threads = 3
    with pytest.raises(UsageError, match="run was loaded with 3 threads and 1 are measured"):
        lab.profile(run)


def candidate(**known: Any) -> Candidate:
    return Candidate("c", "cpu", "fp32", 1, **{"reduced": False, **known})


def test_the_ideal_is_a_ratio_of_macs() -> None:
    reduced = candidate(reduced=True, macs=500, dense_macs=1000)
    assert ideal_ratio(candidate(macs=800), reduced) == pytest.approx(1.6)
    assert ideal_ratio(candidate(), reduced) == pytest.approx(2)
    assert ideal_ratio(candidate(reduced=True), reduced) is None
    assert ideal_ratio(candidate(macs=800), candidate()) is None
    assert ideal_ratio(candidate(), reduced, alike=False) is None
    assert ideal_ratio(candidate(macs=800), reduced, alike=False) == pytest.approx(1.6)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Two real engines, with memory and blocks; their times are never asserted."""
    folder = tmp_path_factory.mktemp("engines")
    toys.engine(folder / "dense.engine").close()
    toys.engine(folder / "small.engine", keep=4).close()
    return profile(
        [folder / "dense.engine", str(folder / "small.engine")],
        batches=[2],
        threads=1,
        plan=Plan(rounds=6, sample=0.0005),
        blocks=True,
    )


def test_engines_are_described(found: Profile) -> None:
    dense, small = found.candidates
    assert (dense.name, small.name, small.target) == ("dense", "small", "cpu")
    assert small.tokens == (8, 4)
    assert small.size is not None
    assert small.size > 1000
    assert small.memory is not None
    assert small.memory.peak > small.memory.own >= 0
    assert found.timing("small", 2).ideal == pytest.approx(1000 / 600)
    assert any("random weights in dense, small" in said for said in found.sentences)
    assert len(found.blocks) == 2
    assert len(found.changes) == 1


def test_the_size_counts_what_the_back_end_loads(tmp_path: Path) -> None:
    with toys.engine(tmp_path / "toy") as engine:
        assert disk_size(engine) == (engine.folder / "model.onnx").stat().st_size


def test_the_result_is_plain_json(found: Profile) -> None:
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["schema"] == "thresher.profile/1"
    assert data["conditions"]["threads"] == 1
    assert data["conditions"]["versions"]["onnxruntime"]


def test_reports(found: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(found, tmp_path / "r.html")
    write_report(found, tmp_path / "r.png")
    html = (tmp_path / "r.html").read_text()
    assert html.count("data:image/png;base64,") == 4, "two charts, light and dark"
    assert "realised" in html
    assert found.conditions.cpu in html
    assert 'src="http' not in html
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"an \.html or a \.png file, not 'r\.pdf'"):
        write_report(found, tmp_path / "r.pdf")


def test_names_in_a_report_are_escaped(lab: Lab, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_report(lab.profile(lab.runnable("<script>", lambda i: 0.1)), tmp_path / "r.html")
    assert "<script>" not in (tmp_path / "r.html").read_text()


def test_the_machine_is_read() -> None:
    read = conditions(2, 0.0)
    assert read.cpu
    assert read.cores >= 1
    assert 1 <= default_threads() <= min(8, usable_cores())
    assert read.busy is None
    assert "busy" in (conditions(usable_cores(), 50.0).busy or "")
