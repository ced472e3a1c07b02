"""Bad input: one clear sentence, the right exit code, and nothing lost or left half-written."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import SOURCE, Cli, Made, listing
from tests.cli.toy import vit
from thresher.runtime.backends import openvino

Failed = Callable[..., str]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of the toy."""
    path = tmp_path / "toy.safetensors"
    save_file(vit().state_dict(), path)
    return path


def optimize(failed: Failed, code: int, source: object, out: Path, *more: object) -> str:
    """Fail at ``optimize``, and leave nothing under the final name or beside it."""
    before = listing(out.parent)
    said = failed(code, "optimize", source, "-o", out, *more)
    assert listing(out.parent) == before
    return said


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_exist(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--weights", tmp_path / "no.safetensors")
    assert "no.safetensors does not exist" in said


def test_a_truncated_checkpoint(failed: Failed, weights: Path, tmp_path: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--weights", weights)
    assert "is not a whole safetensors file" in said
    assert "toy.safetensors" in said


def test_weights_of_another_architecture_list_the_first_keys(
    failed: Failed, weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    source = "timm:vit_tiny_patch16_224"
    said = optimize(failed, 2, source, tmp_path / "a", "--weights", weights)
    for part in ("toy.safetensors", "timm:vit_tiny_patch16_224", "cls_token", "missing"):
        assert part in said


def test_a_tensor_of_another_shape(failed: Failed, tmp_path: Path) -> None:
    state = vit().state_dict()
    state["encoder.head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--weights", tmp_path / "w.safetensors")
    assert "encoder.head.bias" in said
    assert "7" in said


class Bomb:
    """What a hostile checkpoint holds: unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_is_no_weights_is_not_executed(failed: Failed, tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"model": Bomb(mark)}))
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--weights", path)
    assert "w.pth" in said
    assert not mark.exists()


def test_weights_with_nan_are_named_and_the_work_goes_on(cli: Cli, tmp_path: Path) -> None:
    state = vit().state_dict()
    state["encoder.norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    given = ("--weights", tmp_path / "w.safetensors", "--set", "r=5")
    done = cli("optimize", SOURCE, *given, "-o", tmp_path / "a")
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert "encoder.norm.weight" in done.err


# --- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nonsense", "is not a model"),
        ("tests.cli.toy:vti", "did you mean 'vit'"),
        ("no.such.module:vit", "no module"),
        ("missing.onnx", "missing.onnx does not exist"),
        ("missing.pt2", "missing.pt2 does not exist"),
        ("timm:vit_tiny_patch16_225", "did you mean"),
    ],
)
def test_a_source_that_is_not_there(failed: Failed, tmp_path: Path, source: str, said: str) -> None:
    assert said in optimize(failed, 2, source, tmp_path / "a")


def test_pretrained_weights_without_the_hub(failed: Failed, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    said = optimize(failed, 4, "timm:vit_tiny_patch16_224", tmp_path / "a")
    assert "--weights FILE" in said


def test_a_missing_extra_names_its_install_command(
    failed: Failed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    said = optimize(failed, 4, "timm:vit_tiny_patch16_224", tmp_path / "a")
    assert "pip install 'thresher[timm]'" in said


def test_an_onnx_file_that_is_no_transformer(failed: Failed, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["":20]>
        net (float[batch, 3, 8, 8] x) => (float[batch, 3, 1, 1] y) {
          h = Relu(x)
          y = GlobalAveragePool(h)
        }"""
    )
    onnx.save(model, tmp_path / "net.onnx")
    said = optimize(failed, 3, tmp_path / "net.onnx", tmp_path / "a")
    assert "attention" in said


def test_a_file_that_is_no_onnx(failed: Failed, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("hello")
    assert "net.onnx" in optimize(failed, 2, tmp_path / "net.onnx", tmp_path / "a")


def test_a_network_without_attention(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 3, "tests.cli.toy:convolutions", tmp_path / "a")
    assert "pass 'tome' applied nowhere" in said
    assert "no attention was found" in said


# --- recipes and budgets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("inflct=1", "did you mean 'inflect'"),
        ("r=many", "r"),
        ("r", "option=value"),
        ("tomme.r=3", "did you mean 'tome'"),
        ("r=-1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_setting(failed: Failed, tmp_path: Path, setting: str, said: str) -> None:
    assert said in optimize(failed, 2, SOURCE, tmp_path / "a", "--set", setting)


def test_an_unknown_key_in_a_recipe_file_is_shown_at_its_place(
    failed: Failed, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\npasses:\n  - tome: {r: 3, inflct: 1}\n")
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--recipe", recipe)
    assert "mine.yaml:3:18" in said
    assert "did you mean 'inflect'" in said


def test_an_unknown_recipe(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--recipe", "tomme")
    assert "did you mean 'tome'" in said


def test_two_budgets_at_once(failed: Failed, tmp_path: Path) -> None:
    more = ("--set", "r=3", "--flops", "0.7")
    assert "one budget" in optimize(failed, 2, SOURCE, tmp_path / "a", *more)
    more = ("--speedup", "2", "--flops", "0.5")
    assert "one budget" in optimize(failed, 2, SOURCE, tmp_path / "a", *more)


def test_more_tokens_to_remove_than_there_are(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--set", "r=30")
    assert "r=30" in said
    assert "37 tokens" in said


def test_a_budget_that_cannot_be_met(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 1, SOURCE, tmp_path / "a", "--flops", "0.05")
    assert "flops=0.05 cannot be met" in said


# --- output -----------------------------------------------------------------------------------


def test_an_output_folder_that_exists_is_kept(failed: Failed, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "exists already" in optimize(failed, 2, SOURCE, out)
    assert "was not written by thresher" in optimize(failed, 2, SOURCE, out, "--overwrite")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_output_that_is_a_file(failed: Failed, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert "is a file" in optimize(failed, 2, SOURCE, tmp_path / "a")


def half_written(error: BaseException) -> Callable[..., None]:
    """A writer that gets half of its work done."""

    def write(program: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    return write


def test_a_full_disk_leaves_nothing(
    failed: Failed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch.export, "save", half_written(full))
    assert "No space left on device" in optimize(failed, 2, SOURCE, tmp_path / "a")


def test_an_interrupt_while_writing_leaves_the_older_folder(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    assert cli("optimize", SOURCE, "--set", "r=5", "-o", out).code == 0
    before = (out / "program.pt2").read_bytes()
    monkeypatch.setattr(torch.export, "save", half_written(KeyboardInterrupt()))
    done = cli("optimize", SOURCE, "--set", "r=6", "-o", out, "--overwrite")
    assert (done.code, done.out) == (130, "")
    assert listing(tmp_path) == ["a"]
    assert (out / "program.pt2").read_bytes() == before


def test_a_real_interrupt_ends_the_process_with_130(tmp_path: Path) -> None:
    code = "from thresher.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "optimize", "tests.cli.toy:interrupted"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "a")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == []


# --- engines and targets ----------------------------------------------------------------------


def test_an_unknown_target(failed: Failed, made: Made, tmp_path: Path) -> None:
    said = failed(2, "export", made.reduced, "--target", "openvin", "-o", tmp_path / "e")
    assert "did you mean 'openvino'" in said
    assert listing(tmp_path) == []


def test_an_unknown_precision(failed: Failed, made: Made, tmp_path: Path) -> None:
    said = failed(2, "export", made.reduced, "--precision", "fp23", "-o", tmp_path / "e")
    assert "fp32" in said


def test_a_missing_back_end_is_a_requirement_and_no_fall_back(
    failed: Failed, monkeypatch: pytest.MonkeyPatch, made: Made, tmp_path: Path
) -> None:
    monkeypatch.setattr(openvino.OpenVino, "package", "no_such_package")
    said = failed(4, "export", made.reduced, "--target", "openvino", "-o", tmp_path / "e")
    assert "pip install 'thresher[openvino]'" in said
    assert listing(tmp_path) == []


def test_an_engine_that_was_changed(failed: Failed, made: Made, cli: Cli, tmp_path: Path) -> None:
    engine = tmp_path / "e.engine"
    assert cli("export", made.reduced, "-o", engine).code == 0
    with (engine / "model.onnx").open("ab") as file:
        file.write(b"x")
    said = failed(2, "run", engine, "--input", made.image)
    assert "is not the file that was exported" in said


def test_a_folder_that_is_no_engine(failed: Failed, made: Made, tmp_path: Path) -> None:
    assert "is not an engine" in failed(2, "run", tmp_path, "--input", made.image)


# --- data -------------------------------------------------------------------------------------


def test_an_image_that_does_not_decode(failed: Failed, made: Made, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(made.image.read_bytes()[:100])
    assert "cannot be decoded" in failed(2, "run", made.engine, "--input", tmp_path / "p.png")
    arguments = ("inspect", made.reduced, "--image", tmp_path / "p.png", "-o", tmp_path / "k.png")
    assert "cannot be decoded" in failed(2, *arguments)
    assert listing(tmp_path) == ["p.png"]


def test_an_image_that_is_not_there(failed: Failed, made: Made, tmp_path: Path) -> None:
    said = failed(2, "run", made.engine, "--input", tmp_path / "p.png")
    assert "p.png does not exist" in said


def test_nothing_to_run_on(failed: Failed, made: Made) -> None:
    assert "--input FILE" in failed(2, "run", made.engine)


def test_arrays_of_another_shape(failed: Failed, made: Made, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 3, 25, 24), np.float32))
    said = failed(2, "run", made.engine, "--input", tmp_path / "in.npz")
    assert "axis 2 of the input 'x' is 25 and must be 24" in said


def test_a_picture_of_a_program_that_reduces_nothing(
    failed: Failed, made: Made, tmp_path: Path
) -> None:
    said = failed(2, "inspect", SOURCE, "--image", made.image, "-o", tmp_path / "k.png")
    assert "drops and merges no tokens and has no adaptive networks" in said


@pytest.mark.parametrize(
    ("labels", "said"),
    [(np.zeros(3, np.int64), "3"), (np.full(5, 4), "4"), (np.full(5, -1), "-1")],
)
def test_labels_that_do_not_fit(
    failed: Failed, made: Made, tmp_path: Path, labels: np.ndarray, said: str
) -> None:
    images = np.zeros((5, 24, 24, 3), np.uint8)
    np.savez(tmp_path / "t.npz", images=images, labels=labels)
    arguments = ("--data", tmp_path / "t.npz", "--max-drop", "1")
    for verb in (
        ("verify", made.dense_engine, made.engine),
        ("optimize", SOURCE, "-o", tmp_path / "a"),
    ):
        told = failed(2, *verb, *arguments)
        assert "t.npz" in told
        assert said in told


def test_data_that_is_not_there(failed: Failed, tmp_path: Path) -> None:
    said = optimize(failed, 2, SOURCE, tmp_path / "a", "--data", tmp_path / "no.npz")
    assert "no.npz" in said


@pytest.mark.parametrize("batch", ["0", "1,x", "", "-3"])
def test_a_wrong_batch(failed: Failed, made: Made, batch: str) -> None:
    assert "--batch" in failed(2, "profile", made.engine, f"--batch={batch}")


def test_a_wrong_resolution(failed: Failed) -> None:
    assert "--resolution" in failed(2, "plan", SOURCE, "--resolution", "12x12x12")
