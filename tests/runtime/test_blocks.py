"""Nodes find their block again after fusion and inlining."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.runtime import toys
from thresher.runtime.blocks import (
    BlockProfile,
    BlockTime,
    block_profiles,
    compare_blocks,
    without_overhead,
)
from thresher.runtime.provenance import (
    OUTSIDE,
    Origin,
    block_names,
    node_origin,
    nodes_of,
    origins,
    traced,
)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (
            ["", "stem.0", "stem.1", "blocks.0.attn.qkv", "blocks.0.mlp", "blocks.0", "head"],
            [OUTSIDE, "stem", "stem", "blocks.0", "blocks.0", "blocks.0", "head"],
        ),
        (
            ["vit.embeddings.patch", "vit.encoder.layer.1.attn", "vit.encoder.layer.1.out", "fc"],
            ["vit.embeddings", "vit.encoder.layer.1", "vit.encoder.layer.1", "fc"],
        ),
        (["net.0.1.a", "net.0.2.b"], ["net.0", "net.0"]),
    ],
)
def test_blocks_of_module_paths(paths: list[str], expected: list[str]) -> None:
    found = block_names(paths)
    assert [found[path] for path in paths] == expected


def test_where_a_node_comes_from() -> None:
    node = onnx.helper.make_node("BipartiteMerge", ["x"], ["y"], domain="thresher")
    node.metadata_props.add(key="thresher.module", value="blocks.3")
    assert node_origin(node) == Origin("blocks.3", "BipartiteMerge")
    plain = onnx.helper.make_node("Add", ["x"], ["y"])
    scopes = "['', 'blocks.0', 'blocks.0.attn', 'add_3']"
    plain.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert node_origin(plain) == Origin("blocks.0.attn")
    plain.metadata_props[0].value = "not a list"
    assert node_origin(plain) == Origin("")


def test_new_values_belong_to_what_they_feed() -> None:
    model = toys.transformer(5)
    optimised = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["":20, "com.microsoft":1]>
        g (float[2, 8, 16] x) => (float[2, 10] logits) {
          m0 = MatMul(x, weight)
          g0 = com.microsoft.BiasGelu(m0, bias)
          new1 = ReduceSum(g0)
          new2 = Identity(new1)
          k = Identity(new2)
          loose = Identity(k)
        }"""
    )
    found = traced(optimised, origins(model))
    keep = Origin("blocks.0", "Keep")
    mlp = Origin("blocks.0.mlp")
    assert found == [mlp, mlp, keep, keep, keep, Origin("")]


def test_nodes_of_branches_are_told_apart() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["":20]>
        g (float[2] x, bool few) => (float[2] z) {
          y = If (few) <then_branch = t () => (float[2] t1) { t0 = Abs(x) t1 = Neg(t0) },
                        else_branch = e () => (float[2] e1) { e1 = Exp(x) }>
          z = Relu(y)
        }"""
    )
    nodes = [node for node in nodes_of(model.graph) if node.op_type != "If"]
    for number, node in enumerate(nodes):
        node.metadata_props.add(key="thresher.module", value=f"blocks.{number}")
    assert [node.op_type for node in nodes] == ["Abs", "Neg", "Exp", "Relu"]
    own = [Origin(f"blocks.{number}") for number in range(4)]
    assert traced(model, origins(model)) == [*own[:3], Origin(""), own[3]]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlockProfile, ...]:
    folder = tmp_path_factory.mktemp("engines")
    toys.engine(folder / "dense").close()
    toys.engine(folder / "small", keep=4).close()
    return block_profiles([folder / "dense", folder / "small"], toys.feeds(), threads=1, runs=3)


def test_every_block_of_both_models_is_timed(profiles: tuple[BlockProfile, ...]) -> None:
    dense, small = profiles
    assert [b.block for b in dense.blocks] == ["blocks.0", "blocks.1", "head"]
    assert [b.block for b in small.blocks] == ["blocks.0", "blocks.1", "head"]
    assert dense.inserted == {}
    assert small.inserted.keys() == {"Keep"}
    assert [b.block for b in small.blocks if b.inserted] == ["blocks.0"]
    assert sum(b.own for b in small.blocks) > 0
    assert small.total == pytest.approx(sum(b.own + b.inserted for b in small.blocks))


@pytest.mark.parametrize(
    ("wall", "expected"),
    [(20, [1, 2, 9]), (9, [0, 1, 8]), (6, [0, 0, 6]), (0, [0, 0, 0])],
)
def test_the_profilers_overhead_is_taken_off(wall: float, expected: list[float]) -> None:
    found = without_overhead({0: 1.0, 1: 2.0, 2: 9.0}, wall)
    assert list(found.values()) == pytest.approx(expected)


def test_large_models_are_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.runtime.bundle.EXTERNAL_ABOVE", 100)
    toys.engine(tmp_path / "large").close()
    (found,) = block_profiles([tmp_path / "large"], toys.feeds(), threads=1, runs=1)
    assert len(found.blocks) == 3


def made(name: str, own: float, inserted: float) -> BlockProfile:
    row = BlockTime("blocks.0", own, inserted)
    return BlockProfile(name, 2, 1, 1, (row,), {"Merge": inserted} if inserted else {})


def test_the_cost_stands_beside_the_saving() -> None:
    change = compare_blocks(made("dense", 0.010, 0.0), made("small", 0.006, 0.001))
    assert change.saved == pytest.approx(0.004)
    assert change.cost == pytest.approx(0.001)
    assert change.sentence == (
        "batch 2: the blocks of small take 4 ms less than those of dense"
        " and its inserted modules 1 ms"
    )
    worse = compare_blocks(made("dense", 0.010, 0.0), made("small", 0.0095, 0.001))
    assert worse.sentence.endswith("1 ms: no gain here")
    more = compare_blocks(made("dense", 0.010, 0.0), made("small", 0.011, 0.001))
    assert "take 1 ms more than" in more.sentence
