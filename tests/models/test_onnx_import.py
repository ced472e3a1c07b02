"""ONNX files as Programs: real exporters' files against ONNX Runtime, names, sizes, refusals."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from tests.models.onnx_text import feed, file_of, onnxruntime_outputs, targets
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, module_path
from thresher.models.onnx_import import import_onnx
from thresher.models.onnx_import.dry_run import Input
from thresher.models.onnx_import.inputs import example_sizes

LAYERS = 2
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


class Last(nn.Module):
    """A transformers model by positional inputs; gives its last hidden state."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True))).last_hidden_state


def _vit() -> tuple[nn.Module, dict[str, torch.Tensor], dict[int, str]]:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=LAYERS, embed_dim=48, num_classes=10
    )
    return model, {"x": torch.zeros(2, 3, 32, 32)}, {0: "batch"}


def _dinov2() -> tuple[nn.Module, dict[str, torch.Tensor], dict[int, str]]:
    """Position embeddings of a 5 x 5 grid, resized to 3 x 4 inside the graph."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(image_size=70, patch_size=14, **_SMALL)
    model = Last(transformers.Dinov2Model(config), ("pixel_values",))
    return model, {"pixel_values": torch.zeros(2, 3, 42, 56)}, {0: "batch"}


def _bert(attention: str = "sdpa") -> tuple[nn.Module, dict[str, torch.Tensor], dict[int, str]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=32, attn_implementation=attention, **_SMALL
    )
    names = ("input_ids", "attention_mask")
    model = Last(transformers.BertModel(config, add_pooling_layer=False), names)
    example = {name: torch.ones(2, 7, dtype=torch.int64) for name in names}
    return model, example, {0: "batch", 1: "sequence"}


MODELS: dict[str, Callable[[], Any]] = {
    "vit": _vit,
    "dinov2": _dinov2,
    "bert": _bert,
    "bert-eager": lambda: _bert("eager"),
}


def _export(name: str, exporter: str, path: Path) -> Path:
    torch.manual_seed(0)
    model, example, axes = MODELS[name]()
    for parameter in model.parameters():  # all different: exporters merge equal weights
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    options: dict[str, Any] = {"input_names": list(example), "output_names": ["y"]}
    if exporter == "dynamo":
        dims = {label: torch.export.Dim(label, max=32) for label in axes.values()}
        shapes = tuple({a: dims[label] for a, label in axes.items()} for _ in example)
        options["dynamic_shapes"] = (shapes,) if isinstance(model, Last) else shapes
        options |= {"dynamo": True, "opset_version": 20, "external_data": False, "verbose": False}
    else:
        options["dynamic_axes"] = {name: dict(axes) for name in example}
        options |= {"dynamo": False, "opset_version": 11 if exporter == "old" else 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), tuple(example.values()), str(path), **options)
    return path


@pytest.fixture(scope="module")
def imported(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], tuple[Path, Program]]:
    """File and Program of a model by an exporter, each made once."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, str], tuple[Path, Program]] = {}

    def get(name: str, exporter: str) -> tuple[Path, Program]:
        if (name, exporter) not in made:
            path = _export(name, exporter, folder / f"{name}-{exporter}.onnx")
            made[name, exporter] = path, import_onnx(path)
        return made[name, exporter]

    return get


CASES = [
    ("vit", "dynamo"), ("vit", "torchscript"), ("dinov2", "dynamo"), ("dinov2", "torchscript"),
    ("bert", "dynamo"), ("bert", "torchscript"), ("bert-eager", "old"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_numbers_are_those_of_onnx_runtime(imported: Any, name: str, exporter: str) -> None:
    path, program = imported(name, exporter)
    for batch, length in ((1, 5), (3, 9)):
        inputs = feed(program.inputs, batch, length)
        found = program.run(inputs)
        for value, wanted in zip(found.values(), onnxruntime_outputs(path, inputs), strict=True):
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_layers_and_attention_are_whole(imported: Any, name: str, exporter: str) -> None:
    _, program = imported(name, exporter)
    count = Counter(targets(program))
    assert count["scaled_dot_product_attention"] == LAYERS
    assert count["gelu"] == LAYERS
    assert count["layer_norm"] == 2 * LAYERS + 1
    assert count["linear"] == (9 if name == "vit" else 6 * LAYERS)
    assert not count.keys() & {"softmax", "matmul", "erf", "tanh", "pow", "upsample_bicubic2d"}


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_every_block_is_a_site(imported: Any, name: str, exporter: str) -> None:
    found = find_sites(imported(name, exporter)[1])
    assert [site.layer for site in found.sites] == list(range(LAYERS))
    assert (found.padding is not None) == name.startswith("bert")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_weights_and_paths_have_the_names_of_the_model(imported: Any, exporter: str) -> None:
    _, program = imported("vit", exporter)
    parameters = dict(program.exported.named_parameters())
    assert parameters["blocks.1.attn.qkv.weight"].shape == (144, 48)
    assert {"blocks.0.mlp.fc1.bias", "pos_embed", "head.weight"} <= parameters.keys()
    paths = [module_path(n) for n in program.graph.nodes if "scaled_dot" in str(n.target)]
    assert paths == ["blocks.0.attn", "blocks.1.attn"]


def test_padding_mask_keeps_one_row(imported: Any) -> None:
    for exporter in ("dynamo", "torchscript"):
        mask = find_sites(imported("bert", exporter)[1]).padding
        assert mask is not None
        assert list(mask.meta["val"].shape)[1:3] == [1, 1]


def test_program_survives_saving(imported: Any, tmp_path: Path) -> None:
    _, program = imported("bert", "torchscript")
    program.save(tmp_path / "saved")
    inputs = feed(program.inputs, 2, 6)
    again = Program.load(tmp_path / "saved").run(inputs)
    torch.testing.assert_close(again, program.run(inputs), rtol=0, atol=0)


def test_contract_is_that_of_the_file(imported: Any) -> None:
    path, program = imported("bert", "torchscript")
    assert [(spec.name, spec.dtype, spec.shape) for spec in program.inputs] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert [(spec.name, spec.shape) for spec in program.outputs] == [
        ("y", ("batch", "sequence", 32))
    ]
    assert program.info.source == str(path)
    assert program.info.digest is not None


def test_shapes_fix_and_rename_axes(imported: Any) -> None:
    path, _ = imported("bert", "torchscript")
    both = dict.fromkeys(("input_ids", "attention_mask"), ("rows", 6))
    program = import_onnx(path, shapes=both)
    assert program.inputs[0].shape == ("rows", 6)
    inputs = feed(program.inputs, 3, 0)
    (wanted,) = onnxruntime_outputs(path, inputs)
    np.testing.assert_allclose(program.run(inputs)["y"].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_shapes_must_fit(imported: Any) -> None:
    path, _ = imported("vit", "torchscript")
    with pytest.raises(UsageError, match="no input 'y'"):
        import_onnx(path, shapes={"y": (2, 3, 32, 32)})
    with pytest.raises(UsageError, match="has 4 axes"):
        import_onnx(path, shapes={"x": (2, 3)})
    with pytest.raises(RefusedError, match=r"cannot be imported|cannot be dynamic"):
        import_onnx(path, shapes={"x": ("batch", 3, 64, 64)})


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = (
        "<ir_version: 8, opset_import: ['' : 17, 'mine' : 1]> g (float[b,2,n,8] q) => (float[b,2,n,8] y)"
        " { y = mine.attend(q) }"
        " <opset_import: ['' : 17], domain: 'mine'> attend (q) => (y) {"
        " t = Transpose<perm = [0,1,3,2]>(q) s = MatMul(q, t) p = Softmax<axis = -1>(s) y = MatMul(p, q) }"
    )
    assert targets(import_onnx(file_of(text, tmp_path))).count("scaled_dot_product_attention") == 1


def test_inputs_get_usable_names(tmp_path: Path) -> None:
    shape: list[str | int | None] = ["N", 2, 5, 8]
    nodes = [
        helper.make_node("Attention", ["input.1", "input.1", "input.1"], ["out.2"]),
    ]
    values = [helper.make_tensor_value_info(n, 1, shape) for n in ("input.1", "out.2")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    path = tmp_path / "names.onnx"
    opset = helper.make_opsetid("", 23)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    program = import_onnx(path)
    assert ([s.name for s in program.inputs], [s.name for s in program.outputs]) == (
        ["input_1"], ["out.2"],
    )  # fmt: skip


def test_example_sizes_suit_the_input_and_differ() -> None:
    image = Input("x", torch.float32, ("b", 3, "h", "w"))
    assert example_sizes([image]) == {"b": 2, "h": 224, "w": 448}
    wave, ids = Input("w", torch.float32, ("b", "t")), Input("i", torch.int64, ("b", "n"))
    assert example_sizes([wave, ids]) == {"b": 2, "n": 5, "t": 16000}
