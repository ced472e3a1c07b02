"""Type-check the tree under its installed name, through a throw-away tree of links."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run mypy over ``thresher`` and ``tests``; its exit code."""
    config = ROOT / "pyproject.toml"
    folders = tomllib.loads(config.read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as tree:
        Path(tree, "thresher").mkdir()
        for name, folder in folders.items():
            link = Path(tree, *name.split("."))
            link.symlink_to(ROOT / folder, target_is_directory=True)
        Path(tree, "tests").symlink_to(ROOT / "tests", target_is_directory=True)
        options = ["--config-file", str(config), "--cache-dir", str(ROOT / ".mypy_cache")]
        command = [sys.executable, "-m", "mypy", *options, "-p", "thresher", "-p", "tests"]
        return subprocess.call([*command, *sys.argv[1:]], cwd=tree)


if __name__ == "__main__":
    raise SystemExit(main())
