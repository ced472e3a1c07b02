"""Passes by name: lazy, with plug-ins from installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thresher.compiler import registry
from thresher.compiler.contract import ContractError
from thresher.compiler.errors import MissingRequirementError, UsageError

MODULE = """
from thresher.compiler.contract import Options, Pass

class Shout(Pass[Options]):
    name = "shout"
    summary = "a pass of somebody else"
    def run(self, program, context): ...

class NoPass: ...
"""


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, str], None]]:
    """Installs a distribution with one entry point: (distribution, name, target)."""

    def install(distribution: str, name: str, target: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[thresher.passes]\n{name} = {target}\n")
        (site / "shouting_plug_in.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(site))

    clear()
    yield install
    clear()
    sys.modules.pop("shouting_plug_in", None)


def clear() -> None:
    registry.load.cache_clear()
    registry._plug_ins.cache_clear()


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_pass_loads_under_its_name(name: str) -> None:
    assert registry.load(name).name == name


def test_built_in_passes_are_listed_by_name() -> None:
    assert list(registry.BUILT_IN) == sorted(registry.BUILT_IN)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no pass 'tomme'; did you mean 'tome'\?"):
        registry.load("tomme")


def test_a_plug_in_is_found_by_name(install: Callable[[str, str, str], None]) -> None:
    install("loud", "shout", "shouting_plug_in:Shout")
    assert "shout" in registry.names()
    assert "shouting_plug_in" not in sys.modules
    assert registry.load("shout").summary == "a pass of somebody else"


def test_two_plug_ins_of_one_name_are_both_named(install: Callable[[str, str, str], None]) -> None:
    install("loud", "shout", "shouting_plug_in:Shout")
    install("louder", "shout", "shouting_plug_in:Shout")
    with pytest.raises(UsageError, match=r"by loud \(.*\) and by louder \(.*\): uninstall"):
        registry.load("shout")
    assert registry.load("tome").name == "tome"


def test_a_plug_in_cannot_replace_a_built_in_pass(
    install: Callable[[str, str, str], None],
) -> None:
    install("loud", "tome", "shouting_plug_in:Shout")
    with pytest.raises(UsageError, match=r"'tome' is offered by loud .* and by thresher itself"):
        registry.load("tome")


@pytest.mark.parametrize(
    ("name", "target", "error", "said"),
    [
        ("shout", "not_there:Shout", MissingRequirementError, "'shout' of loud .* cannot be imp"),
        ("shout", "shouting_plug_in:Gone", MissingRequirementError, "'shout' of loud .* cannot"),
        ("shout", "shouting_plug_in:NoPass", ContractError, "is no subclass of Pass"),
        ("whisper", "shouting_plug_in:Shout", ContractError, "its class says 'shout'"),
    ],
)
def test_a_bad_plug_in_is_named(
    install: Callable[[str, str, str], None],
    name: str,
    target: str,
    error: type[Exception],
    said: str,
) -> None:
    install("loud", name, target)
    with pytest.raises(error, match=said):
        registry.load(name)


def test_names_and_recipes_are_listed_without_torch() -> None:
    code = (
        "import sys; from thresher.compiler import recipe, registry;"
        "assert 'tome' in registry.names() and recipe.built_in()['tome'];"
        "print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
