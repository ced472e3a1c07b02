"""The wheel must hold every package folder, and nothing else: its list is written by hand."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = set(SETUPTOOLS["package-dir"].values())


def test_every_package_is_listed() -> None:
    on_disk = {
        "thresher." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert on_disk == set(SETUPTOOLS["packages"])


def test_every_module_lies_in_a_package() -> None:
    modules = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in modules if not (folder / "__init__.py").exists()] == []


def test_every_package_is_typed() -> None:
    assert [folder for folder in FOLDERS if not (ROOT / folder / "py.typed").exists()] == []


def test_nothing_was_imported_under_a_bare_name() -> None:
    assert {name for name in FOLDERS if sys.modules.get(name) is not None} == set()


def checks(file: Path) -> Iterator[str]:
    """Functions of a test file that assert something, are not collected and are never called."""
    tree = ast.parse(file.read_text())
    names = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    names.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("test_"):
            continue
        asserts = any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
        if asserts and not names[node.name] and not node.decorator_list:
            yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_no_test_goes_uncollected() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    assert [name for file in files for name in checks(file)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive as a user's installer would."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def wanted() -> set[str]:
    """Names in the wheel of every tracked source and data file."""
    command = ["git", "ls-files", *sorted(FOLDERS)]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    kinds = (".py", ".typed", ".yaml", ".npz", ".safetensors", ".cc", ".cpp", ".cu", ".h", ".txt")
    return {f"thresher/{name}" for name in listed.stdout.splitlines() if name.endswith(kinds)}


@pytest.mark.slow
def test_wheel_holds_the_packages_and_their_data_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"thresher"}
    assert wanted() <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(place), str(wheel)], check=True, capture_output=True)
    code = (
        "import sys; import thresher.cli.main as m; assert m.__file__.startswith(sys.path[0]);"
        "raise SystemExit(m.main(['recipes', '--json']))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(place)!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"tome"' in done.stdout
