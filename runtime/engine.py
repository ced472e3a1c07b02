"""An engine: a folder that ``export`` wrote, loaded and ready to run.  Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.runtime import manifest as manifests
from thresher.runtime.backends import Session, backend
from thresher.runtime.conditions import default_threads
from thresher.runtime.feeds import Array, checked
from thresher.runtime.manifest import Manifest, Ranges, TensorInfo
from thresher.runtime.runner import changing, choosing
from thresher.runtime.two_graphs import EarlyExit, Left


class Engine:
    """A loaded engine.  Fulfils :class:`~thresher.runtime.runner.Runnable`.

    ``details`` says what really runs: provider, threads, arithmetic.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        session: Session | None,
        threads: int,
        reason: str = "",
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.name = folder.name.removesuffix(".engine")
        self.load_seconds = 0.0
        self._session = session
        self._reason = reason  # why there never was a session

    @staticmethod
    def load(folder: Path | str, *, threads: int | None = None) -> Engine:
        """Check the manifest, the files and the installed packages, then load.

        An engine that was built for a machine of another kind is described and not run.

        Args:
            folder: an engine folder.
            threads: CPU threads; by default :func:`~thresher.runtime.conditions.default_threads`.

        Raises:
            UsageError: not an engine, another schema, or a file that has changed.
            MissingRequirementError: the back end or the right version of it is not installed.
            RefusedError: the back end refuses the model.
        """
        folder = Path(folder)
        manifest = manifests.read(folder)
        maker = backend(manifest.target)
        manifests.check_files(manifest, folder)
        maker.demand()
        reason = maker.cannot_run()
        if not reason:
            manifests.check_versions(manifest, folder)
        threads = default_threads() if threads is None else threads
        if threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        start = time.perf_counter()
        session = None if reason else _session(folder, manifest, threads)
        engine = Engine(folder, manifest, session, threads, reason)
        engine.load_seconds = time.perf_counter() - start
        return engine

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.manifest.outputs

    @property
    def ranges(self) -> Ranges:
        """Allowed sizes of the symbolic axes."""
        return self.manifest.ranges

    @property
    def precision(self) -> str:
        return self.manifest.precision

    @property
    def reduced(self) -> bool:
        """Whether the engine drops, merges or skips tokens."""
        return choosing(self.manifest.passes)

    @property
    def changed_by(self) -> tuple[str, ...]:
        """The passes that changed the outputs by more than rounding, with their options."""
        return changing(self.manifest.passes)

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How inputs are made from raw data; a tokenizer's file lies in the folder."""
        found = self.manifest.preprocessing
        if found is None or not found.get("tokenizer"):
            return found
        return {**found, "tokenizer": str(self.folder / found["tokenizer"])}

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, where the model has some."""
        return self.manifest.labels

    @property
    def left_early(self) -> Left | None:
        """Of an engine with an exit, how many items left by it so far."""
        return self._session.left if isinstance(self._session, Staged) else None

    @property
    def details(self) -> dict[str, str]:
        return dict(self._open().details)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.  Inputs are checked; floats are cast to the wanted width, integers if they fit.

        Raises:
            UsageError: an input is unknown, missing, or has the wrong dtype, rank or size.
        """
        return self._open().run(checked(inputs, self.inputs, self.ranges))

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _open(self) -> Session:
        if self._reason:
            raise MissingRequirementError(f"{self.folder} cannot be run: {self._reason}")
        if self._session is None:
            raise UsageError(f"the engine {self.folder} is closed: load it again")
        return self._session


class Staged:
    """The session of an engine with an exit: two engines, run by the host."""

    def __init__(self, first: Engine, rest: Engine) -> None:
        self._engines = (first, rest)
        self._exit = EarlyExit(first, rest)
        self.details = {
            **first.details,
            "graphs": "2, of which the host runs the second for items that go on",
        }

    @property
    def left(self) -> Left:
        """How many items left early so far."""
        return self._exit.left

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._exit.run(feeds)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def _session(folder: Path, manifest: Manifest, threads: int) -> Session:
    """What runs the engine: the back end's session, or two engines in the folder."""
    if not manifest.graphs:
        return backend(manifest.target).open(folder, manifest, threads)
    first, rest = (Engine.load(folder / name, threads=threads) for name in manifest.graphs)
    return Staged(first, rest)
