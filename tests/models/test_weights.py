"""Weight files: what is read, what is refused, and in which words."""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from thresher.compiler.errors import UsageError
from thresher.models.weights import digest, fit, read_weights


class Bomb:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    state = toy().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    read = read_weights(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_wrapper_and_prefix_are_taken_off(tmp_path: Path, key: str) -> None:
    path = tmp_path / "w.pth"
    state = {f"module.{k}": v for k, v in toy().state_dict().items()}
    options = argparse.Namespace(lr=0.1)
    torch.save({"epoch": 3, "args": options, key: state, "optimizer": {"lr": 1}}, path)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fit(model, read_weights(path), origin="w.pth", name="toy")
    assert torch.equal(model.state_dict()["0.weight"], toy().state_dict()["0.weight"])


def test_half_precision_is_widened() -> None:
    model = toy()
    fit(model, {k: v.half() for k, v in model.state_dict().items()}, origin="w", name="toy")
    assert model.state_dict()["0.weight"].dtype is torch.float32


def test_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "mark"
    torch.save({"state_dict": toy().state_dict(), "hook": Bomb(mark)}, path)
    with pytest.raises(UsageError, match="was not executed"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UsageError, match=r"w\.pth"):
        read_weights(path)
    assert not mark.exists()


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist.*\.safetensors"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="is a folder"):
        read_weights(tmp_path)
    (tmp_path / "w.txt").write_text("x")
    with pytest.raises(UsageError, match="not known as a weight file"):
        read_weights(tmp_path / "w.txt")


@pytest.mark.parametrize(
    ("keep", "reason"),
    [(-7, "its header promises"), (4, "only 4 bytes"), (40, "header is cut off")],
)
def test_truncated_safetensors(tmp_path: Path, keep: int, reason: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(toy().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=reason):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"PK junk", b"\x80\x02garbage"])
def test_damaged_torch_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"w\.pt"):
        read_weights(path)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"epoch": 3}])
def test_other_contents(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(UsageError, match="holds"):
        read_weights(path)


def test_mismatch_counts_and_names() -> None:
    state = toy().state_dict()
    state["1.weight"] = torch.ones(5, 4)
    state["extra"] = state.pop("0.bias")
    with pytest.raises(UsageError) as caught:
        fit(toy(), state, origin="w.pth", name="toy")
    text = str(caught.value)
    assert "1 of 4 tensors are missing (0.bias)" in text
    assert "1 are unexpected (extra)" in text
    assert "1.weight is 5x4 and should be 2x4" in text


def test_non_finite_weights_are_named(caplog: pytest.LogCaptureFixture) -> None:
    state = toy().state_dict()
    state["1.bias"] = torch.tensor([1.0, float("nan")])
    with caplog.at_level(logging.WARNING, "thresher"):
        fit(toy(), state, origin="w.pth", name="toy")
    assert "1.bias" in caplog.text
    assert "w.pth" in caplog.text


def test_digest(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"abc")
    assert digest(path) == hashlib.sha256(b"abc").hexdigest()
