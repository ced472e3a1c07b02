"""Every test here goes through the real entry point and looks at both streams and the exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thresher.cli.main import main

SOURCE = "tests.cli.toy:vit"


@dataclass(frozen=True)
class Result:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run ``thresher ARGUMENTS``."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def failed(cli: Cli) -> Callable[..., str]:
    """Run a command that the user got wrong: its one sentence on standard error, and no more."""

    def run(code: int, *arguments: object) -> str:
        done = cli(*arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert done.err.startswith("thresher: ")
        assert len(done.err.splitlines()) == 1, done.err
        return done.err

    return run


@dataclass(frozen=True)
class Made:
    """Artefacts of the toy, made once by the verbs themselves."""

    reduced: Path
    engine: Path
    dense_engine: Path
    image: Path
    data: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A reduced Program, two engines, an image and labelled images."""
    place = tmp_path_factory.mktemp("toy")
    made = Made(*(place / name for name in ("reduced", "r.engine", "d.engine", "p.png", "t.npz")))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), np.uint8)
    Image.fromarray(pixels[0]).save(made.image)
    np.savez(made.data, images=pixels, labels=np.arange(12) % 4)
    with chdir(place):
        assert main(["optimize", SOURCE, "-o", str(made.reduced), "--set", "r=5"]) == 0
        assert main(["export", str(made.reduced), "-o", str(made.engine)]) == 0
        assert main(["export", SOURCE, "-o", str(made.dense_engine)]) == 0
    return made


def listing(folder: Path) -> list[str]:
    """Everything in a folder, hidden files among it."""
    return sorted(os.listdir(folder))


def refused(
    cli: Cli,
    made: Made,
    out: Path,
    quick: Sequence[str],
    given: Sequence[str],
    code: int,
    said: str,
) -> None:
    """``optimize`` with such options ends with this code and one sentence; ``DATA`` stands for the data made."""
    arguments = [made.data if word == "DATA" else word for word in given]
    done = cli("optimize", SOURCE, *quick, *arguments, "-o", out)
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err
