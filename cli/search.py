"""``thresher search``: how many tokens stay at each layer, by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from thresher.cli import options
from thresher.cli.board import Board
from thresher.cli.console import Progress, progress, say, show, show_json
from thresher.cli.opening import answers_with_classes, axis_sizes, open_data, open_program
from thresher.cli.profile import NEGATIVE
from thresher.compiler.errors import UsageError, nearest

if TYPE_CHECKING:
    from thresher.cli.searching import Bench, Setting
    from thresher.compiler.program import Program
    from thresher.passes.tokens.search.front import Demands
    from thresher.passes.tokens.search.strategy import Strategy
    from thresher.passes.tokens.search.study import Study

LOSSLESS = "g-search"  # needs no budget
STRATEGIES = (LOSSLESS, "p-sigmoid", "per-layer")
TRIALS = 40  # of the strategies that never end by themselves (30 to 60 are usual for P-Sigmoid)
STUDY_FILE, FRONT_FILE = "study.db", "front.json"


def search(
    source: options.Source,
    output: options.Output,
    data: Annotated[str, typer.Option(metavar="DATA", help="Data to search on, as in 'verify'.")],
    method: Annotated[
        str, typer.Option("--method", metavar="NAME|FILE", help="Recipe whose counts are searched.")
    ] = options.DEFAULT_RECIPE,
    settings: options.Settings = None,
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "p-sigmoid",
    flops: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Demand: share of the dense multiply-accumulates; 0.65 unless --speedup or g-search.",
        ),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(min=1.0, help="Demand: measured speed-up over dense.")
    ] = None,
    max_drop: options.MaxDrop = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Points that are no drop to g-search; by default one standard error of the"
            " difference, and no more than --max-drop.",
        ),
    ] = None,
    cost: Annotated[
        Literal["time", "flops", "energy"],
        typer.Option(help="What quality is weighed against; flops measures no time."),
    ] = "time",
    trials: Annotated[
        int | None,
        typer.Option(min=1, help=f"Evaluations of the whole study; {TRIALS} unless g-search."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Optuna storage that workers share, or a FILE.journal; by default {STUDY_FILE} in"
            " the output folder.",
        ),
    ] = None,
    study: Annotated[str, typer.Option(metavar="NAME", help="Name in the storage.")] = "search",
    limit: options.Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed visits of a candidate.")] = 15,
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    size: options.Size = None,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves and of the proposals.")] = 0,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Search how many tokens stay at each layer, on data and on the target's clock.

    Leaves the Pareto front as data, plot and recipes in the output folder.  The same command again
    goes on where it stopped, and may run on several machines at once with one --storage.  Exit code 1
    when a demand is not met.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"there is no strategy {strategy!r}{nearest(strategy, STRATEGIES)}")
    if flops is not None and speedup is not None:
        raise UsageError("--flops and --speedup are two demands on cost: give one of them")
    if speedup is not None and cost == "flops":
        raise UsageError("--speedup is a measured time, which --cost flops leaves out: drop one")
    check_output(output)
    with ExitStack() as stack:
        with progress() as tell:
            from thresher.cli.searching import Setting
            from thresher.passes.tokens.options import DEFAULT_FLOPS
            from thresher.passes.tokens.search.front import Demands
            from thresher.runtime.conditions import default_threads

            if flops is None and speedup is None and strategy != LOSSLESS:
                flops = DEFAULT_FLOPS
            demands = Demands(flops, speedup, share_of(max_drop), share_of(tolerance))
            count, sizes = threads or default_threads(), axis_sizes(size)
            setting = Setting(target, precision, batch, count, cost, rounds, seed, sizes)
            dense = open_program(source, options.wishes(weights, resolution, length), tell)
            bench = bench_of(dense, method, settings or [], data, limit, setting, tell)
            chosen = strategy_of(strategy, bench, demands)
            url = storage or f"sqlite:///{output.resolve() / STUDY_FILE}"
            shared = open_study(url, output, study, bench, chosen, demands)
            tell("running the dense model", 0, 0)
            stack.enter_context(bench)
        most = trials or chosen.most or TRIALS
        price(shared, chosen, bench, most)
        with resumable(shared, most):
            with Board(most, setting.cost, demands, shared.known()) as board:
                shared.run(chosen, bench, most, board.add)
            with progress() as tell:
                from thresher.cli.findings import conclude

                found = conclude(shared.known(), chosen, bench, demands, tell)
            found.write(output)
    if json:
        show_json("search", found.to_json())
    else:
        show(*found.tables(), *found.sentences, f"written: {', '.join(found.files(output))}")
    if not found.met:
        raise typer.Exit(NEGATIVE)


def check_output(output: Path) -> None:
    """Refuse a folder of somebody else; an earlier search is gone on with.

    Raises:
        UsageError: the folder holds other things.
    """
    if output.is_file():
        raise UsageError(f"{output} is a file, not a folder: give another output folder")
    names = {entry.name for entry in output.iterdir()} if output.exists() else set()
    if names and names.isdisjoint({STUDY_FILE, FRONT_FILE}):
        raise UsageError(f"{output} holds other files than a search's: give another output folder")


def bench_of(
    dense: Program,
    method: str,
    settings: list[str],
    data: str,
    limit: int | None,
    setting: Setting,
    tell: Progress,
) -> Bench:
    """The model with its data split in halves."""
    from thresher.cli.searching import Bench
    from thresher.models.split import halves

    tell(f"reading {data}", 0, 0)
    dataset = open_data(data, dense.info, dense.outputs)
    assert dataset is not None
    split = halves(dataset, limit, setting.seed)
    return Bench(dense, method, settings, split, setting, classes=answers_with_classes(dense))


def share_of(points: float | None) -> float | None:
    """Hundredths as a share."""
    return None if points is None else points / 100


def strategy_of(name: str, bench: Bench, demands: Demands) -> Strategy:
    """The strategy by name; its budget, if it has one, is the demand on cost.

    Raises:
        VerdictError: the method cannot meet the budget.
    """
    from thresher.passes.tokens.search.gsearch import GSearch
    from thresher.passes.tokens.search.perlayer import PerLayer
    from thresher.passes.tokens.search.psigmoid import PSigmoid
    from thresher.passes.tokens.search.strategy import Budget

    if name == GSearch.name:
        return GSearch(bench.space, lambda outcome: demands.harmless(outcome.quality))
    budget = Budget.of(bench.space, demands.flops, demands.speedup)
    return (PSigmoid if name == PSigmoid.name else PerLayer)(bench.space, budget)


def open_study(
    url: str,
    output: Path,
    name: str,
    bench: Bench,
    strategy: Strategy,
    demands: Demands,
) -> Study:
    """The study that this search goes on with, or a new one."""
    from thresher.passes.tokens.search.study import Study

    asked = asdict(demands)
    if strategy.most is None:
        del asked["drop"], asked["tolerance"]  # they judge, and lead nothing
    fingerprint = {
        **bench.fingerprint(),
        "strategy": strategy.name,
        "demand": ", ".join(f"{k} {v:g}" for k, v in asked.items() if v is not None) or "none",
    }
    output.mkdir(parents=True, exist_ok=True)
    return Study(
        url,
        name,
        fingerprint,
        seed=bench.setting.seed,
        violation=demands.excess,
    )


@contextmanager
def resumable(study: Study, trials: int) -> Iterator[None]:
    """Say at an interrupt that the work so far is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(
            f"stopped with {len(study.known())} of {trials} trials, which are kept in {study.url}:"
            " run the same command again to go on"
        )
        raise


def price(study: Study, strategy: Strategy, bench: Bench, trials: int) -> None:
    """What the rest of the search will cost, from earlier trials or from the dense model's run."""
    earlier = study.durations()
    seconds = median(earlier) if earlier else bench.estimate
    left = max(0, trials - len(earlier))
    most = "at most " if strategy.most else ""
    known = f" ({len(earlier)} of {trials} are done)" if earlier else ""
    say(
        f"{strategy.name}: {most}{left} trials{known} of about {seconds:.1f} s,"
        f" about {duration(left * seconds)} in one process"
    )


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"`` or ``"3.5 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
