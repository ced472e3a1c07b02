"""Jetson: a folder that builds its engine on the device, as TensorRT's engines hold for one GPU and version.

The folder holds ``model.onnx``, the plugins' sources, a lock file, and two scripts that need only what JetPack
brings: ``build.py`` makes ``engine.plan``, ``run.py`` runs and times it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from thresher.compiler.errors import MissingRequirementError
from thresher.runtime.backends.base import Availability, Backend, Session, Tell, silent
from thresher.runtime.backends.tensorrt_build import bounds
from thresher.runtime.backends.tensorrt_family import TensorRtFamily
from thresher.runtime.manifest import Manifest, digest

if TYPE_CHECKING:
    import onnx

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tuple(ROOT / "runtime" / "jetson" / name for name in ("build.py", "run.py"))
PLUGINS = ("kernels/cuda/*", "kernels/tensorrt/*", "kernels/*/cuda.cu")  # patterns of their sources
LOCK = "lock.json"
NEXT = "on the device: python3 build.py, then python3 run.py --input NAME=FILE.npy"


class Jetson(TensorRtFamily):
    """A bundle for one kind of Jetson; TensorRT's refusals are those of the family."""

    package = "onnxruntime"  # compares model.onnx with the eager program
    install = "pip install onnxruntime"
    prefix = "engine."
    choices = cached = False
    capability: ClassVar[str]

    def available(self) -> Availability:
        state = Backend.available(self)
        return Availability(True, state.version, self.cannot_run()) if state.ok else state

    def cannot_run(self) -> str:
        return "its engine is built on the device, by build.py in the folder"

    def free_memory(self) -> int | None:
        return None  # that of the device is not known here

    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        return {}  # lock.json holds what the device has to have

    def build(self, folder: Path, manifest: Manifest, tell: Tell = silent) -> dict[str, Any]:
        for script in SCRIPTS:
            shutil.copyfile(script, folder / script.name)
        sources = plugin_sources()
        for file in sources:
            place = folder / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        lock = {
            "target": self.name,
            "capability": self.capability,
            "tensorrt": "10",  # major version, of JetPack 6.1 and later
            "precision": manifest.precision,
            "inputs": [spec.model_dump(mode="json") for spec in manifest.inputs],
            "profile": _profile(manifest),
            "versions": manifest.versions,
            "files": {file.relative_to(folder).as_posix(): digest(file) for file in files},
        }
        (folder / LOCK).write_text(json.dumps(lock, indent=2) + "\n")
        return {"next": NEXT, "plugins": [file.relative_to(ROOT).as_posix() for file in sources]}

    def open(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        raise MissingRequirementError(f"{folder} cannot be run: {self.cannot_run()}")


class JetsonOrin(Jetson):
    target = "jetson-orin"
    summary = "a folder that builds its engine on a Jetson Orin"
    capability = "8.7"


class JetsonThor(Jetson):
    target = "jetson-thor"
    summary = "a folder that builds its engine on a Jetson Thor"
    capability = "11.0"


def plugin_sources() -> list[Path]:
    """The sources of the TensorRT plugins and the CUDA kernels in them, in a fixed order."""
    found = {file for pattern in PLUGINS for file in ROOT.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix not in (".py", ".pyc"))


def _profile(manifest: Manifest) -> dict[str, list[list[int]]]:
    """Least, usual and largest shape of each input, where an axis is symbolic."""
    if not any(isinstance(axis, str) for spec in manifest.inputs for axis in spec.shape):
        return {}
    return {
        spec.name: [list(shape) for shape in bounds(spec.shape, manifest)]
        for spec in manifest.inputs
    }
