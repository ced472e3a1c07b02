"""The verdict on rows, their cells, and the chart, without a model."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from PIL import Image

from thresher.runtime.comparing import Comparison, Row, Score, judged
from thresher.runtime.comparison_chart import _labels, _lines, _styles, comparison_chart
from thresher.runtime.comparison_report import Report
from thresher.runtime.conditions import conditions
from thresher.runtime.measure import Warmth
from thresher.runtime.paired import Difference
from thresher.runtime.stats import Ratio, Spread
from thresher.runtime.tables import comparison, markdown
from thresher.runtime.timing import Timing


def timing(name: str, speedup: float) -> Timing:
    seconds = 0.1 / speedup
    spread = Spread(seconds, 0.9 * seconds, 1.2 * seconds, 15)
    ratio = Ratio(speedup, speedup - 0.1, speedup + 0.1, 0.96, 15)
    return Timing(name, 8, spread, 8 / seconds, Warmth(6, True, seconds), ratio)


def row(method: str, asked: float | None, drop: float, speedup: float, **more: Any) -> Row:
    """A row that loses ``drop`` points."""
    change = Difference(-drop / 100, 0.005, -drop / 0.5, 12, 3)
    score = Score("accuracy", 0.9 - drop / 100, 0.003, 1000, True, True, change)
    return Row(
        method, asked, method == "random", None, asked, (197, 17), 1 / asked if asked else None,
        (score,), timing(method, speedup), **more,
    )  # fmt: skip


@pytest.fixture
def found() -> Comparison:
    dense = Row(
        "dense", None, False, share=1.0, time=timing("dense", 1.0),
        scores=(Score("accuracy", 0.9, 0.003, 1000, True, True),),
    )  # fmt: skip
    rows = (
        dense,
        row("tome", 0.8, 0.1, 1.2),
        row("random", 0.8, 0.0, 1.3),
        row("tome", 0.5, 0.9, 1.9),
        Row("evit", 0.5, False, "no class token | none"),
        row("random", 0.5, 3.0, 2.0),
    )
    return Comparison(rows, "random", 8, "cpu", "fp32", conditions(1, 0.0))


def test_of_rows_within_the_drop_the_fastest_is_best(found: Comparison) -> None:
    verdict = judged(found, ["tome"], 1.0)
    assert (verdict.met, verdict.best) == (True, "tome 0.5")
    assert "2 of 2 rows" in verdict.sentence
    assert "(-0.90 points, standard error 0.50, 1.90 times as fast as dense)" in verdict.sentence
    assert judged(found, ["tome"], 0.5).best == "tome 0.8"


def test_when_none_is_within_the_drop_the_least_loss_is_named(found: Comparison) -> None:
    verdict = judged(found, ["tome", "evit"], 0.05)
    assert (verdict.met, verdict.best) == (False, "tome 0.8")
    assert verdict.sentence.startswith(
        "no row loses at most 0.05 points; the best row found is tome"
    )


def test_the_control_counts_only_where_it_was_asked_for(found: Comparison) -> None:
    assert judged(found, ["tome"], 0.0).met is False
    assert judged(found, ["random"], 0.0).best == "random 0.8"
    refused = judged(found, ["evit"], 0.0)
    assert (refused.met, refused.best) == (False, "")
    assert "refused" in refused.sentence


def test_cells_of_a_row(found: Comparison) -> None:
    head, rows = comparison(found)
    cells = dict(zip(head, rows[3], strict=True))
    assert cells == {
        "method": "tome",
        "work left": "50/50.0%",
        "tokens": "197-17",
        "accuracy": "89.10%",
        "change": "-0.90 ± 0.50",
        "flips": "-12 +3",
        "over random": "",
        "ideal": "2.00",
        "speed-up": "1.90 (1.80-2.00)",
        "of ideal": "",
        "ms": "52.6",
        "items/s": "152.0",
    }
    assert rows[4][:3] == ("evit", "50/", "refused")
    assert {len(cells) for cells in rows} == {len(head)}


def test_markdown_has_a_column_for_every_head_in_every_line() -> None:
    text = markdown(["a", "b|c"], [["1", "2"], ["x|y", ""]])
    assert text.splitlines() == [
        "| a    | b\\|c |",
        "| ---- | ---: |",
        "| 1    |    2 |",
        "| x\\|y |      |",
    ]


def test_a_record_is_json_without_infinities(found: Comparison) -> None:
    change = Difference(-1.0, 0.0, -math.inf, 5, 0)
    score = Score("accuracy", 0.0, 0.0, 5, True, True, change, change)
    odd = replace(found, rows=(Row("x", 0.5, False, scores=(score,)),))
    report = Report(odd, "toy", "quality: accuracy", "thresher compare toy", "random")
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["rows"][0]["scores"][0]["against_dense"]["sigmas"] is None
    assert "quality means nothing" in " ".join(report.sentences())


def test_the_chart_has_a_panel_for_each_metric(found: Comparison) -> None:
    def size(compared: Comparison) -> tuple[int, int]:
        with Image.open(io.BytesIO(comparison_chart(compared, "title"))) as drawn:
            drawn.load()
            return drawn.size

    twice = tuple(replace(row, scores=row.scores * 2) for row in found.rows)
    both = replace(found, rows=twice)
    width, height = size(found)
    assert size(both) == (width, 2 * height)


def test_no_two_methods_of_a_chart_look_alike() -> None:
    assert len(set(islice(_styles(), 36))) == 36


def test_settings_of_a_method_are_one_line_of_a_chart() -> None:
    rows = [
        row("acm@0.6", None, 0.1, 1.1),
        row("tome", 0.5, 0.2, 1.9),
        row("acm@0.4", None, 0.3, 1.2),
    ]
    found = _lines(rows)
    assert list(found) == ["acm", "tome"]
    assert [each.method for each in found["acm"]] == ["acm@0.4", "acm@0.6"]


def test_labels_of_a_chart_do_not_lie_on_each_other() -> None:
    rows = [row("a", 0.5, 0.1, 2.0), row("b", 0.55, 0.1, 1.95), row("a", 0.8, 0.1, 1.2)]
    assert _labels(rows) == {0.5: pytest.approx(50), 0.8: pytest.approx(100 / 1.2)}
    assert _labels([]) == {}
