"""Skipped inputs in a tiny causal language model: measured on text, judged token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.conftest import Cli
from tests.kernels.test_sparse_engines import nodes_of
from tests.models.folders import GROUPED, build, save, word_tokenizer
from thresher.cli.opening import open_measured
from thresher.compiler.analysis.cost import parameters
from thresher.models.sources import load_source
from thresher.passes.sparsity.criterion import Judge, choose

pytest.importorskip("transformers")
LENGTH, WINDOWS = 24, 3
SMALL = {
    **GROUPED,
    "num_hidden_layers": 1,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with one layer, tied embeddings and a tokenizer, and a text of 17 windows."""
    place = tmp_path_factory.mktemp("llama")
    save(_model(), place)
    word_tokenizer(place)
    (place / "text.txt").write_text(" ".join(f"w{number}" for number in _words().flatten()))
    return place


def _model() -> Any:
    return build("LlamaForCausalLM", "LlamaConfig", **SMALL)


def _words() -> np.ndarray[Any, np.dtype[np.int64]]:
    """``[17, LENGTH]``: as they are cut."""
    return np.random.default_rng(0).integers(5, 120, (17, LENGTH))


def _loss(model: Any, windows: int) -> float:
    """As transformers has it, nats per foretold token."""
    ids = torch.from_numpy(_words()[:windows])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def _skipping(model: Any, method: str, thresholds: dict[str, Tensor]) -> Any:
    """The model with every input, or every gate, masked at its threshold, for each token by itself."""

    def masked(x: Tensor, threshold: Tensor) -> Tensor:
        return torch.where(x.abs() <= threshold, 0.0, x)

    def mask(threshold: Tensor) -> Callable[..., tuple[Tensor]]:
        return lambda _, given: (masked(given[0], threshold),)

    for number, layer in enumerate(model.model.layers):
        if method == "cats":
            limits = thresholds[f"threshold.{number}.down"]
            layer.mlp.act_fn.register_forward_hook(lambda _, __, s, t=limits: masked(s, t))
            continue
        for kind, names in SITES.items():
            for name in names:
                threshold = thresholds[f"threshold.{number}.{kind}"]
                layer.get_submodule(name).register_forward_pre_hook(mask(threshold))
    return model


def test_the_loss_is_that_of_the_next_token(folder: Path) -> None:
    program = load_source(f"hf:{folder}")
    data = open_measured(str(folder / "text.txt"), program)
    assert len(data) == 17
    criterion = choose(program, data)
    assert criterion.kind == "perplexity"
    judge = Judge(program, data, range(WINDOWS), criterion, batch=2)
    assert judge.dense == pytest.approx(_loss(_model(), WINDOWS), rel=1e-5)
    assert parameters(program) == sum(p.numel() for p in _model().parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "operators"), [("teal", 4 * ["SparseLinear"]), ("cats", ["SparseSwiGLU"])]
)
def test_a_prompt_is_read_dense_and_steps_skip(
    method: str, operators: list[str], cli: Cli, folder: Path, tmp_path: Path
) -> None:
    """Perplexity of steps is that of transformers with the same masks on every input."""
    source, text = f"hf:{folder}", folder / "text.txt"
    options = (f"method={method}", "sparsity=0.6", "allow=true")  # its matrices are tiny
    asked = ("--recipe", "sparsity", *(word for o in options for word in ("--set", o)))
    done = cli(
        "optimize", source, *asked, "--learn-data", text, "-o", tmp_path / "sparse", "--json"
    )
    assert (done.code, done.err) == (0, "")
    for given in (source, tmp_path / "sparse"):
        assert cli("export", given, "-o", tmp_path / f"{Path(given).name}.engine").code == 0
    both = [tmp_path / f"{name}.engine" for name in (folder.name, "sparse")]
    nodes = nodes_of(onnx.load(both[1] / "model.onnx", load_external_data=False).graph)
    assert [node.op_type for node in nodes if node.domain == "thresher"] == operators
    judged = ("verify", *both, "--data", text, "--limit", str(WINDOWS), "--json")
    whole, steps = (cli(*judged, *more).json["perplexity"] for more in ((), ("--step", "1")))
    assert (whole["step"], steps["step"]) == (None, 1)
    assert abs(whole["rise"]) < 1e-4
    dense = np.exp(_loss(_model(), WINDOWS))
    thresholds = load_file(tmp_path / "sparse" / "sparsity.safetensors")
    skipped = _skipping(_model(), method, thresholds)
    assert steps["perplexity_a"] == pytest.approx(dense, rel=1e-4)
    assert steps["perplexity_b"] == pytest.approx(np.exp(_loss(skipped, WINDOWS)), rel=1e-4)
    assert abs(steps["rise"]) > 0.01
    refused = cli("verify", *both, "--step", "1")
    assert (refused.code, "leave it out" in refused.err) == (2, True)
    written = cli("run", both[1], "--prompt", "w11 w7 w30", "--tokens", "4", "--json")
    assert len(written.json["tokens"]) == 4


@pytest.mark.slow
def test_the_report_speaks_of_steps(cli: Cli, folder: Path) -> None:
    text = folder / "text.txt"
    done = cli("inspect", f"hf:{folder}", "--sparsity", "--data", text, "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json["sparsity"]
    assert (found["criterion"], found["items"]) == ("perplexity", 9)
    assert {verdict["tokens"] for verdict in found["verdicts"]} == {1, LENGTH}  # and a prompt
    assert not any(v["pays"] for v in found["verdicts"] if v["tokens"] == LENGTH)
    weights = SMALL["hidden_size"] * SMALL["intermediate_size"]
    share = weights / sum(p.numel() for p in _model().parameters())
    assert [layer["weights"] for layer in found["layers"]] == pytest.approx([share])


def test_mistakes_are_one_sentence(
    failed: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    source, text = f"hf:{folder}", folder / "text.txt"
    given = ("optimize", source, "-o", tmp_path / "x", "--recipe", "sparsity")
    assert "--learn-data" in failed(2, *given, "--data", text)
    assert "is no text file" in failed(2, *given, "--learn-data", tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text(" ".join(["w7"] * 7 * LENGTH))
    said = failed(2, *given, "--learn-data", short)
    assert f"{short} has 7 items and calibration needs at least 8: give more data" in said
    short.write_text("w7 w8 w9")
    assert "give more text" in failed(2, *given, "--learn-data", short)
    assert not (tmp_path / "x").exists()
