"""A folder for a Jetson, from the command line to the engine that its script builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Cli, Made, listing
from tests.runtime.fake_jetson import Device


def test_what_is_exported_is_built_and_run_on_the_device(
    cli: Cli,
    failed: Callable[..., str],
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = ("export", made.reduced, "--target", "jetson-orin", "-o", tmp_path / "j")
    assert "give for example --shape x=1..32x3x24x24@8" in failed(2, *target)
    done = cli(*target, "--shape", "x=1..4x3x24x24@2")
    assert (done.code, done.err) == (0, "")
    assert "on the device: python3 build.py" in done.out
    assert "CPUExecutionProvider" in done.out
    files = ["build.py", "lock.json", "manifest.json", "model.onnx", "run.py"]
    assert set(files) <= set(listing(tmp_path / "j"))
    assert "cannot be run" in failed(4, "run", tmp_path / "j", "--input", made.image)
    device = Device(tmp_path / "j", monkeypatch)
    assert device.main("build.py") == 0
    np.save(tmp_path / "x.npy", np.zeros((3, 3, 24, 24), np.float32))
    capsys.readouterr()
    assert device.main("run.py", "--input", f"x={tmp_path / 'x.npy'}", "--rounds", "0") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["logits"]["shape"] == [3, 4]
