"""The oracle is itself tested: against the dense model and against a second, shortening oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from .decisions import (
    Method,
    diverse,
    hash_score,
    keep,
    merge,
    merge_by_size,
    merge_redundant,
    prune_by_votes,
    prune_merge,
    sample,
)
from .entry import Entry
from .oracle import Reduced, reduced_outputs
from .shorten import shortened_logits
from .shorten_text import shortened_bert, shortened_modernbert
from .zoo import BY_NAME, ENTRIES, REDUCIBLE

METHODS: tuple[Method, ...] = (
    "tome",
    "evit",
    "topk-norm",
    "random",
    "diffrate",
    "max-min",
    "pitome",
    "ats",
)
WALKED = [  # timm models that the second oracle can walk
    entry
    for entry in REDUCIBLE
    if entry.name.startswith("timm:") and not entry.dense and "distilled" not in entry.name
]
PADDED = [entry for entry in REDUCIBLE if entry.real is not None]
SHARP = "timm:vit_small_patch14_reg4_dinov2"  # the one family of every day for these
SELDOM = ("max-min", "pitome", "tome-mlerp", "ats")
VARIANTS = (*METHODS, "evit-fuse", "tome-mlerp", "tome-unweighted")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(entries: list[Entry] | tuple[Entry, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def cases(entries: list[Entry], methods: Sequence[str]) -> pytest.MarkDecorator:
    """Entry x method, less evit and ats where no class token is read."""
    pairs = [
        pytest.param(
            entry,
            method,
            id=f"{entry.name}-{method}",
            marks=pytest.mark.slow if method in SELDOM and entry.name != SHARP else (),
        )
        for entry in entries
        for method in methods
        if entry.class_token is not None or not method.startswith(("evit", "ats"))
    ]
    return pytest.mark.parametrize(("entry", "method"), pairs)


def dense(entry: Entry, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: dict[str, Tensor] = entry.build()[0](**inputs)
    return outputs


def schedule(entry: Entry, tokens: int, step: int = 6) -> list[int]:
    return [max(tokens - step * (i + 1), entry.prefix + 4) for i in range(entry.layers)]


def token_count(entry: Entry) -> int:
    model, inputs = entry.build()
    return reduced_outputs(entry, model, inputs(1), "tome", None).real.shape[1]


@names(ENTRIES)
def test_models_are_seeded_and_per_sample(entry: Entry) -> None:
    model, inputs = entry.build()
    three = inputs(3)
    with torch.no_grad():
        outputs = model(**three)
        again = entry.build()[0](**three)
        first = model(**{k: v[:1] for k, v in three.items()})
    for name, value in outputs.items():
        assert value.dtype == (torch.int64 if name == "codes" else torch.float64)
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
        torch.testing.assert_close(first[name], value[:1], rtol=0, atol=entry.tolerance)
        assert not torch.allclose(value[0], value[1])


@names(REDUCIBLE)
def test_nothing_reduced_is_the_dense_model(entry: Entry) -> None:
    model, inputs = entry.build()
    wanted = dense(entry, inputs(2))
    tokens = token_count(entry)
    for counts in (None, [tokens] * entry.layers):
        result = reduced_outputs(entry, model, inputs(2), "tome", counts)
        assert result.tokens == [tokens] * entry.layers
        for name, value in wanted.items():
            torch.testing.assert_close(result.outputs[name], value, rtol=0, atol=1e-12)


@cases(WALKED, VARIANTS)
def test_masking_equals_shortening(entry: Entry, method: str) -> None:
    fuse, proportional = method == "evit-fuse", method != "tome-unweighted"
    mlerp = method == "tome-mlerp"
    kind = next(known for known in METHODS if method.startswith(known))
    model, inputs = entry.build()
    counts = schedule(entry, token_count(entry))
    masked = reduced_outputs(
        entry, model, inputs(2), kind, counts, fuse=fuse, mlerp=mlerp, proportional=proportional
    )
    with torch.no_grad():
        logits, states = shortened_logits(
            model.model,
            inputs(2)["x"],
            kind,
            counts,
            prefix=entry.prefix,
            fuse=fuse,
            mlerp=mlerp,
            proportional=proportional,
            classed=entry.class_token is not None,
        )
    assert masked.tokens == counts
    for layer, state in zip(masked.layers, states, strict=True):
        assert layer.sequence == state.place.tolist()
        assert layer.slot.tolist() == state.slot.tolist()
        if not fuse:
            torch.testing.assert_close(
                layer.size, state.size, rtol=0, atol=1e-9 * (kind == "diffrate")
            )
    torch.testing.assert_close(masked.outputs["logits"], logits, rtol=0, atol=1e-9)
    assert (logits - dense(entry, inputs(2))["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["hf:bert", "hf:modernbert"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_masking_equals_shortening_with_padding(name: str, prefix: int) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build()
    given = inputs(3)
    counts = schedule(entry, token_count(entry))
    masked = reduced_outputs(entry, model, given, "tome", counts, prefix=prefix)
    walk = shortened_bert if name == "hf:bert" else shortened_modernbert
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        hidden, states = walk(model.model, ids, mask, counts, prefix)
    for layer, state in zip(masked.layers, states, strict=True):
        assert layer.sequence == state.place.tolist()
        assert torch.equal(layer.slot[masked.real], state.slot[masked.real])
        torch.testing.assert_close(layer.size, state.size, rtol=0, atol=0)
    real, got = masked.real, masked.outputs["last_hidden_state"]
    torch.testing.assert_close(got[real], hidden[real], rtol=0, atol=entry.tolerance)


@names(REDUCIBLE)
def test_maps_are_consistent(entry: Entry) -> None:
    model, inputs = entry.build()
    counts = schedule(entry, token_count(entry), step=4)
    for method in ("tome", "topk-norm"):
        result = reduced_outputs(entry, model, inputs(2), method, counts)
        real = result.real.double()
        for layer in result.layers:
            kept = layer.slot >= 0
            total = real if method == "tome" else real * kept
            torch.testing.assert_close(layer.size.sum(1), total.sum(1))
            assert [s[: entry.prefix] for s in layer.sequence] == [list(range(entry.prefix))] * 2
            for slots, sequence in zip(layer.slot.tolist(), layer.sequence, strict=True):
                assert [slots[token] for token in sequence] == list(range(len(sequence)))
                assert set(slots) - {-1} == set(range(len(sequence)))


@pytest.mark.parametrize(
    "name", ["hf:vit", "hf:dinov2", "timm:vit_small_patch14_reg4_dinov2:tokens"]
)
def test_dense_outputs_read_the_group_or_the_value_before_the_drop(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build()
    tokens, output = token_count(entry), entry.dense[0]
    counts = [*[tokens] * (entry.layers - 1), tokens - 6]
    unreduced = dense(entry, inputs(2))[output]
    merged = reduced_outputs(entry, model, inputs(2), "tome", counts)
    for b, slots in enumerate(merged.layers[-1].slot.tolist()):
        for n, slot in enumerate(slots):
            owner = merged.layers[-1].sequence[b][slot]
            row = merged.outputs[output][b]
            torch.testing.assert_close(row[n], row[owner], rtol=0, atol=1e-12)
    pruned = reduced_outputs(entry, model, inputs(2), "random", counts)
    stays = pruned.layers[-1].slot >= 0
    # after a drop in the last layer, survivors are as in the dense model; the others lack its MLP
    value = pruned.outputs[output]
    torch.testing.assert_close(value[stays], unreduced[stays], rtol=0, atol=1e-12)
    assert ((value - unreduced)[~stays].abs().amax(dim=-1) > 1e-3).all()


def test_the_slot_of_a_fused_token_is_restored_in_dense_outputs() -> None:
    entry = BY_NAME["hf:vit"]
    model, inputs = entry.build()
    tokens = token_count(entry)
    fused = reduced_outputs(entry, model, inputs(2), "evit", [tokens, tokens, 20], fuse=True)
    plain = reduced_outputs(entry, model, inputs(2), "evit", [tokens, tokens, 19])
    for name in fused.outputs:  # in the last layer fusing reaches no other token
        torch.testing.assert_close(fused.outputs[name], plain.outputs[name], rtol=0, atol=1e-12)
    assert fused.tokens[-1] == 20
    assert (fused.layers[-1].slot == plain.layers[-1].slot).all()


def real_rows(entry: Entry, result: Reduced, name: str) -> Tensor:
    value = result.outputs[name]
    return value[result.real] if name in entry.dense else value


@cases(PADDED, ["tome", "topk-norm", "evit", "diffrate"])
def test_removing_padding_alone_changes_nothing(entry: Entry, method: Method) -> None:
    model, inputs = entry.build()
    second = {k: v[1:] for k, v in inputs(2).items()}  # the padded row
    tokens = token_count(entry)
    counts = [tokens - 2, *[tokens - 3] * (entry.layers - 1)]
    result = reduced_outputs(entry, model, second, method, counts)
    assert int((~result.real).sum()) >= 6
    for name, value in dense(entry, second).items():
        wanted = value[result.real] if name in entry.dense else value
        got = real_rows(entry, result, name)
        torch.testing.assert_close(got, wanted, rtol=0, atol=entry.tolerance)


@pytest.mark.parametrize("name", ["hf:bert", "hf:modernbert"])
def test_the_content_of_padding_never_matters(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build()
    given = inputs(2)
    other = dict(given)
    other["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], 7)
    counts = schedule(entry, token_count(entry))
    for method in ("tome", "topk-norm", "random"):
        a = reduced_outputs(entry, model, given, method, counts)
        b = reduced_outputs(entry, model, other, method, counts)
        for output in a.outputs:
            torch.testing.assert_close(
                real_rows(entry, a, output),
                real_rows(entry, b, output),
                rtol=0,
                atol=entry.tolerance,
            )


def test_merging_by_hand() -> None:
    # positions 1..6 behind a prefix of one: sources 2 4 6, destinations 1 3 5
    directions = torch.tensor([0.0, 0.0, 10.0, 90.0, 40.0, 180.0, 91.0]).deg2rad()
    metric = torch.stack([directions.cos(), directions.sin()], dim=1)
    ones = [1.0] * 7
    step = merge(range(10, 17), metric, ones, prefix=1, count=2)
    assert step.merged == {16: 13, 12: 11}
    assert step.sequence == [10, 14, 11, 13, 15]
    # at most half of the unprotected tokens go
    assert len(merge(range(10, 17), metric, ones, prefix=1, count=9).sequence) == 4
    # padding goes first, and nothing real goes into padding
    padded = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    step = merge(range(10, 17), metric, padded, prefix=1, count=3)
    assert list(step.merged) == [14, 12, 16]
    assert 13 not in step.merged.values()


def test_merging_by_size_by_hand() -> None:
    directions = torch.tensor([0.0, 0.0, 10.0, 90.0, 40.0, 100.0, 91.0]).deg2rad()
    metric = torch.stack([directions.cos(), directions.sin()], dim=1)
    # behind the prefix of one 12, 14 and 16 are small, and 11, 13 and 15 large
    sizes = [1.0, 3.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    step = merge_by_size(range(10, 17), metric, sizes, prefix=1, count=2)
    assert step.merged == {16: 13, 12: 11}
    assert step.sequence == [10, 11, 13, 14, 15]
    padded = [1.0, 3.0, 1.0, 2.0, 0.0, 2.0, 1.0]
    step = merge_by_size(range(10, 17), metric, padded, prefix=1, count=1)
    assert step.merged == {14: 11}  # padding goes first


def test_without_a_prefix_kept_sources_stay_in_order_of_similarity() -> None:
    directions = torch.tensor([30.0, 0.0, 5.0, 90.0, 70.0, 180.0]).deg2rad()
    metric = torch.stack([directions.cos(), directions.sin()], dim=1)
    step = merge(range(6), metric, [1.0] * 6, prefix=0, count=1)
    assert step.merged == {2: 1}
    assert step.sequence == [4, 0, 1, 3, 5]


def test_keeping_by_hand() -> None:
    score = torch.tensor([9.0, 1.0, 3.0, 2.0, 3.0, 3.0])
    step = keep(range(20, 26), score, [1.0] * 6, prefix=1, count=2)
    assert step.sequence == [20, 22, 24]
    assert step.dropped == [25, 23, 21]
    step = keep(range(20, 26), score, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0], prefix=1, count=4)
    assert step.dropped == [22]


def test_pruning_and_merging_by_hand() -> None:
    directions = torch.tensor([0.0, 10.0, 80.0, 20.0, 0.0, 180.0]).deg2rad()
    x = torch.stack([directions.cos(), directions.sin()], dim=1)
    score = torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    step = prune_merge(range(20, 26), score, x, [1.0] * 6, prefix=1, pruned=5, count=3)
    assert step.sequence == [20, 21, 22]  # 20 is most like 24 and stays apart: it is the prefix
    assert step.merged == {23: 21, 24: 21}
    assert step.dropped == [25]
    assert step.likeness[23] == pytest.approx(math.cos(math.radians(10)))
    padded = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    step = prune_merge(range(20, 26), score, x, padded, prefix=1, pruned=4, count=3)
    assert step.sequence == [20, 22, 23]
    assert (step.merged, step.dropped) == ({24: 23}, [21, 25])


def test_merging_the_redundant_by_hand() -> None:
    directions = torch.tensor([3.0, 0.0, 4.0, 90.0, 6.0, 180.0, 1.0]).deg2rad()
    metric = torch.stack([directions.cos(), directions.sin()], dim=1)
    # behind the prefix 14 has the highest energy, then 12, 16 and 11; 13 and 15 are like no other
    step = merge_redundant(range(10, 17), metric, [1.0] * 7, prefix=1, count=2, margin=0.5)
    assert step.merged == {14: 12, 16: 11}
    assert step.sequence == [10, 11, 12, 13, 15]
    padded = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    step = merge_redundant(range(10, 17), metric, padded, prefix=1, count=1, margin=0.5)
    assert list(step.merged) == [13]  # padding first, and into a real token


def test_max_min_by_hand() -> None:
    directions = torch.tensor([200.0, 0.0, 10.0, 100.0, 50.0, 0.0]).deg2rad()
    x = torch.stack([directions.cos(), directions.sin()], dim=1)
    step = diverse(range(20, 26), x, [1.0] * 6, prefix=1, count=3)
    assert step.sequence == [20, 21, 23, 24]  # 100 has no neighbour, then 0 (the first), then 50
    assert step.dropped == [22, 25]
    padded = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    step = diverse(range(20, 26), x, padded, prefix=1, count=4)
    assert step.sequence == [20, 21, 22, 23, 25]  # padding only once nothing else is left


def test_sampling_by_hand() -> None:
    worth = torch.tensor([9.0, 0.7, 0.1, 0.1, 0.1])
    # quantiles 1/6, 3/6 and 5/6 meet cumulative shares 0.7, 0.8, 0.9 and 1: the first takes two
    capped = sample(range(20, 25), worth, [1.0] * 5, prefix=1, count=3, capped=True)
    assert (capped.sequence, capped.dropped) == ([20, 21, 22], [23, 24])
    filled = sample(range(20, 25), worth, [1.0] * 5, prefix=1, count=3, capped=False)
    assert filled.sequence == [20, 21, 22, 23]
    padded = sample(range(20, 25), worth, [1, 0, 1, 1, 1], prefix=1, count=3, capped=False)
    assert padded.sequence == [20, 22, 23, 24]


def test_votes_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.15, 0.05]]).expand(1, 5, 5)
    metric = torch.eye(5)
    metric[0] = metric[2]  # the last but one in importance repeats a more important token

    def left(similar: int) -> list[int]:
        ones = [1.0] * 5
        return prune_by_votes(range(5), attention, metric, ones, 0, 4, 5, similar, None).sequence

    assert left(similar=1) == [1, 2, 3, 4]
    assert left(similar=0) == [0, 1, 2, 3]


def test_the_hash_has_no_ties() -> None:
    values = hash_score(3)(2, torch.arange(4096))
    assert len(set(values.tolist())) == 4096
    assert values.dtype == torch.int64


def test_without_a_class_token_there_is_no_evit() -> None:
    entry = BY_NAME["timm:vit_base_patch16_siglip_224"]
    model, inputs = entry.build()
    with pytest.raises(ValueError, match="class token"):
        reduced_outputs(entry, model, inputs(1), "evit", [30] * entry.layers)
