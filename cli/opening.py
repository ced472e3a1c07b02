"""From what a user names on the command line to something that can be run or measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from thresher.cli.console import Progress
from thresher.compiler.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from thresher.compiler.program import Program
    from thresher.models.data import Dataset
    from thresher.models.options import SourceOptions
    from thresher.runtime import Engine, ProgramRunner
    from thresher.runtime.perplexity import Windows
    from thresher.runtime.two_graphs import TwoGraphs

    Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray | None]

MANIFEST, RECORD = "manifest.json", "program.yaml"  # what tells an engine and a Program's folder
MEASURED = 256  # tokens of a window of text that a pass measures on
RECIPE = "recipe.yaml"  # beside the Program that 'optimize' wrote


def is_engine(name: str) -> bool:
    """Whether a folder was written by ``export``."""
    return (Path(name) / MANIFEST).is_file()


def open_program(source: str, wishes: SourceOptions, tell: Progress) -> Program:
    """A Program from any source.

    Raises:
        UsageError: the source is an engine, from which there is no way back.
    """
    if is_engine(source):
        raise UsageError(f"{source} is an engine already: give the SOURCE that it was made from")
    tell(f"reading {source}", 0, 0)
    from thresher.models.sources import load_source

    return load_source(source, wishes)


def open_candidate(name: str, wishes: SourceOptions, tell: Progress) -> Path | Program:
    """What ``profile`` takes: an engine's folder as it is, anything else as a Program."""
    return Path(name) if is_engine(name) else _open_one(name, wishes, tell)


def _open_one(name: str, wishes: SourceOptions, tell: Progress) -> Program:
    """One of several candidates; what is wished for the sources does not touch our own folders."""
    from thresher.models.options import SourceOptions

    ours = (Path(name) / RECORD).is_file()
    return open_program(name, SourceOptions() if ours else wishes, tell)


def open_runner(
    name: str, wishes: SourceOptions, threads: int | None, tell: Progress
) -> AbstractContextManager[Engine | ProgramRunner]:
    """Something to run: a loaded engine, or a Program run eagerly."""
    from thresher.runtime import Engine, ProgramRunner

    if is_engine(name):
        return Engine.load(name, threads=threads)
    program = _open_one(name, wishes, tell)
    return nullcontext(ProgramRunner(program, name=Path(name).name, threads=threads))


@contextmanager
def open_steps(
    name: str, steps: str | None, wishes: SourceOptions, threads: int | None, tell: Progress
) -> Iterator[Engine | ProgramRunner | TwoGraphs]:
    """The same, or two graphs of one language model as one.

    Raises:
        UsageError: the two were not made for each other.
    """
    with open_runner(name, wishes, threads, tell) as prompt:
        if steps is None:
            yield prompt
            return
        from thresher.runtime.two_graphs import TwoGraphs

        with open_runner(steps, wishes, threads, tell) as following:
            yield TwoGraphs(prompt, following)


class Told(Protocol):
    """What a SourceInfo, an Engine and a ProgramRunner know alike."""

    @property
    def preprocessing(self) -> dict[str, Any] | None: ...

    @property
    def labels(self) -> tuple[str, ...] | None: ...


class Spec(Protocol):
    """What a TensorSpec and a TensorInfo both know."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int | str, ...]: ...


def open_data(spec: str | None, told: Told, outputs: Sequence[Spec]) -> Dataset | None:
    """The data that ``--data`` names, made into the inputs of a model with these outputs.

    Raises:
        UsageError: no such data, or data and labels that do not fit the model.
    """
    if spec is None:
        return None
    from thresher.models.data import open_dataset

    shape = next((output.shape for output in outputs if output.name == "logits"), ())
    classes = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
    return open_dataset(spec, told.preprocessing, labels=told.labels, classes=classes)


def open_text(
    file: str | None,
    model: Engine | ProgramRunner,
    limit: int | None,
    sizes: dict[str, int],
    step: int | None = None,
    prompt: int | None = None,
) -> Windows | None:
    """The text file that ``--data`` names, if the model is a causal language model.

    Args:
        limit: number of windows to use.
        sizes: of symbolic axes; ``sequence``, the length of a window, is taken out.
        step: tokens to read at once, by default all of a window.
        prompt: tokens of a window that are read at once and not judged, by default none.

    Raises:
        UsageError: no such file, no text, too little of it, the model has no tokenizer, a step or a
            prompt is given without a text to read, or nothing is left behind the prompt.
    """
    from thresher.runtime.generate import is_language_model

    if file is None or not is_language_model(model.inputs):
        for option, given in (("--step", step), ("--prompt-tokens", prompt)):
            if given is not None:
                raise UsageError(
                    f"{option} is for a text that a causal language model reads: leave it out"
                )
        return None
    length = sizes.pop("sequence", None)
    windows = _windows(file, model.preprocessing, model.name, length, limit)
    if prompt is not None and prompt >= windows.ids.shape[1]:
        raise UsageError(
            f"--prompt-tokens {prompt} leaves nothing of a window of {windows.ids.shape[1]} tokens to judge:"
            " give fewer"
        )
    return replace(windows, step=step, prompt=prompt or 0)


def open_measured(spec: str, program: Program) -> Dataset:
    """Data for passes that measure or learn: as :func:`open_data`, and a text for a language model.

    Raises:
        UsageError: no such data, or it does not fit the model.
    """
    from thresher.cli.inputs import language_of
    from thresher.models.data import Dataset
    from thresher.runtime.runner import tensor_info

    if not reads_text(program) or Path(spec).suffix == ".npz":
        found = open_data(spec, program.info, program.outputs)
        assert found is not None
        return found
    info, inputs = program.info, [tensor_info(spec) for spec in program.inputs]
    positions = language_of(info.preprocessing, info.source).positions
    windows = _windows(spec, info.preprocessing, info.source, min(MEASURED, positions), None)
    return Dataset(spec, len(windows.ids), None, lambda rows: windows.feeds(rows, inputs))


def answers_with_classes(program: Program) -> bool:
    """Whether labels can be compared with what a model returns."""
    named = any(output.name == "logits" for output in program.outputs)
    return named or program.info.labels is not None


def reads_text(program: Program) -> bool:
    """Whether a Program is a causal language model."""
    from thresher.runtime.generate import is_language_model
    from thresher.runtime.runner import tensor_info

    return is_language_model([tensor_info(spec) for spec in program.inputs])


def at_once(program: Program) -> int:
    """Items that a pass runs together: windows of text are hundreds of tokens, each with its logits."""
    return 2 if reads_text(program) else 32


def _windows(
    file: str,
    preprocessing: dict[str, Any] | None,
    name: str,
    length: int | None,
    limit: int | None,
) -> Windows:
    from thresher.cli.inputs import language_of
    from thresher.runtime.perplexity import Windows

    steps = language_of(preprocessing, name)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no text file in UTF-8 ({error}): give one") from error
    return Windows.cut(file, steps.read(text), length, steps.positions, limit)


def open_learning(spec: str | None, judged: str | None, program: Program) -> Dataset | None:
    """The data that ``--learn-data`` names, beside the data that the result is judged on.

    Raises:
        UsageError: no such data, or the same as ``judged``.
    """
    if spec is not None and judged is not None and Path(spec).resolve() == Path(judged).resolve():
        raise UsageError(
            f"--learn-data and --data are both {spec}: what was learned from cannot judge"
        )
    return None if spec is None else open_measured(spec, program)


class Watched:
    """A dataset whose batches move a progress bar; labels that are no classes are left out.

    ``classify``: whether the model answers with classes at all, so that labels can be compared.
    """

    def __init__(
        self, dataset: Dataset, limit: int | None, tell: Progress, *, classify: bool = True
    ) -> None:
        self.dataset = dataset
        self.name = dataset.name
        self.labels = dataset.labels
        self.total = min(len(dataset), limit or len(dataset))
        self.tell = tell
        self.classes = classify and self.labels is not None and self.labels.dtype.kind in "iu"

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The batches of the dataset."""
        for index, (inputs, labels) in enumerate(self.dataset.batches(size, limit)):
            self.tell("comparing", index * size, self.total)
            yield inputs, labels if self.classes else None


def recipe_of(source: str) -> dict[str, object] | None:
    """The resolved recipe beside a Program that ``optimize`` wrote."""
    path = Path(source) / RECIPE
    if not path.is_file():
        return None
    import yaml

    read: dict[str, object] = yaml.safe_load(path.read_text())
    return read


def axis_sizes(given: list[str] | None) -> dict[str, int]:
    """``["length=128"]`` to ``{"length": 128}``.

    Raises:
        UsageError: an entry has another form.
    """
    sizes = {}
    for entry in given or []:
        name, equals, size = entry.partition("=")
        if not equals or not size.isdecimal():
            raise UsageError(f"--size {entry!r} is not AXIS=SIZE, such as length=128")
        sizes[name] = int(size)
    return sizes
