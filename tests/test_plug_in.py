"""The guide's example is a package of somebody else: ``tests/plug_in``, found by its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thresher.cli.main import main
from thresher.compiler import registry
from thresher.compiler.contract import Context
from thresher.compiler.errors import UsageError
from thresher.compiler.ledger import token_maps
from thresher.models.sources import load_source
from thresher.passes.tokens.options import TokenOptions

ROOT = Path(__file__).resolve().parent.parent
PLUG_IN = ROOT / "tests" / "plug_in"
MODEL, NAME, MODULE = "tests.cli.toy:vit", "topk-distinct", "topk_distinct"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package on the path, with the metadata that an installer writes."""
    project = tomllib.loads((PLUG_IN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"{project['name'].replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n"
    )
    for group, entries in project["entry-points"].items():
        lines = [f"{name} = {target}\n" for name, target in entries.items()]
        (info / "entry_points.txt").write_text(f"[{group}]\n{''.join(lines)}")
    monkeypatch.syspath_prepend(str(PLUG_IN))
    monkeypatch.syspath_prepend(str(info.parent))
    _forget()
    yield
    _forget()
    sys.modules.pop(MODULE, None)


def _forget() -> None:
    registry.load.cache_clear()
    registry._plug_ins.cache_clear()


def test_the_guide_shows_the_package_as_it_is() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    for file in (PLUG_IN / f"{MODULE}.py", PLUG_IN / "pyproject.toml"):
        assert f"\n{file.read_text()}```" in guide, file.name
    assert len((PLUG_IN / f"{MODULE}.py").read_text().splitlines()) <= 36


def test_it_is_found_by_name_and_only_then_imported(installed: None) -> None:
    assert NAME in registry.names()
    assert MODULE not in sys.modules
    assert registry.load(NAME).__module__ == MODULE


def test_its_score_decides_which_tokens_stay(installed: None) -> None:
    program = load_source(MODEL)
    method = registry.load(NAME)(TokenOptions(keep=0.5, layers=(0,)))
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    (moved,) = token_maps(method(program, Context()).program, {"x": images})
    keys = _keys_of_the_first_block(images)
    apart = (keys - keys.mean(dim=1, keepdim=True)).square().sum(-1)[:, 1:]
    best = apart.topk(18, dim=1).indices.sort(dim=1).values + 1
    assert moved.kept[:, 1:].tolist() == best.tolist()


def _keys_of_the_first_block(images: torch.Tensor) -> torch.Tensor:
    """``[B, N, d]``, averaged over heads, from the module itself."""
    from tests.cli import toy

    seen: list[torch.Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        seen.append(k)
        return attend(q, k, *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        toy.vit()(images)
    return seen[0].mean(dim=1)


def test_a_recipe_names_it(
    installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "distinct.yaml"
    recipe.write_text(f"passes: [{NAME}: {{keep: 0.5}}]")
    assert main(["plan", MODEL, "--recipe", str(recipe), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["passes"]
    assert (record["name"], record["applied"]) == (NAME, 3)


def test_without_it_the_name_is_unknown() -> None:
    _forget()
    with pytest.raises(UsageError, match=r"there is no pass 'topk-distinct'; did you mean 'topk-n"):
        registry.load(NAME)


@pytest.mark.slow
def test_installed_by_pip_it_is_compared_like_any_other(tmp_path: Path) -> None:
    site, out = tmp_path / "site", tmp_path / "out"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    source = tmp_path / "source"  # setuptools builds beside the sources
    source.mkdir()
    for file in PLUG_IN.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    build = [*pip, "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "from thresher.cli.main import main; raise SystemExit(main())"]
    command += [
        "compare",
        "thresher.models.fashion:vit",
        "--data",
        "fashion-mnist",
        "--limit",
        "32",
    ]
    command += ["--methods", NAME, "--flops", "0.65", "--rounds", "6", "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "compare.json").read_text())["rows"]
    row = next(row for row in rows if NAME in json.dumps(row))
    assert row.get("refused") in (None, "")
