"""Options and arguments that several verbs share: the same flag means the same everywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli.console import be_verbose
from thresher.compiler.errors import UsageError

if TYPE_CHECKING:
    from thresher.models.options import SourceOptions

DEFAULT_RECIPE = "tome"
TELLING = ("output", "overwrite", "json", "verbose")  # where a result goes and how it is told
SOURCES = "timm:NAME, hf:FOLDER, FILE.onnx, FILE.pt2, module:function, or a folder of 'optimize'"


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """``"1,8"`` to ``(1, 8)``.

    Raises:
        UsageError: not whole numbers above zero.
    """
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise UsageError(f"{flag} {text!r} is not a list of whole numbers above 0, such as 1,8")
    return values


def listed(text: str, flag: str) -> tuple[str, ...]:
    """``"tome,evit"`` to its names.

    Raises:
        UsageError: a name is empty or comes twice.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise UsageError(f"{flag} {text!r} has an empty entry: separate entries by one comma")
    _demand_once(names, names, flag)
    return names


def shares(text: str, flag: str) -> tuple[float, ...]:
    """``"0.5,0.65"`` to (0.5, 0.65).

    Raises:
        UsageError: not numbers in (0, 1], or one comes twice.
    """
    parts = listed(text, flag)
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise UsageError(
            f"{flag} {text!r} is not a list of shares above 0 and up to 1, such as 0.5,0.8"
        )
    _demand_once(values, parts, flag)
    return values


def _demand_once(values: Sequence[object], shown: Sequence[str], flag: str) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise UsageError(f"{flag} has {shown[index]!r} twice: name it once")


def command_line(context: typer.Context) -> str:
    """The command as it was given, without what only says where and how to print."""
    words = ["thresher", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in TELLING:
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            given = value if isinstance(value, list | tuple) else [value]
            words += [word for one in given for word in (parameter.opts[0], str(one))]
    return shlex.join(words)


def resolution_of(text: str | None) -> tuple[int, int] | None:
    """``"224"`` or ``"224x448"`` to (height, width) in pixels.

    Raises:
        UsageError: neither form.
    """
    if text is None:
        return None
    sides = numbers(text.lower().replace("x", ","), "--resolution")
    if len(sides) > 2:
        raise UsageError(f"--resolution {text!r} is not HEIGHTxWIDTH, such as 224x224")
    return sides[0], sides[-1]


def wishes(weights: str | None, resolution: str | None, length: int | None) -> SourceOptions:
    """What is asked of a source beside its name."""
    from thresher.models.options import SourceOptions

    return SourceOptions(weights=weights, resolution=resolution_of(resolution), length=length)


def overrides(
    settings: list[str] | None, flops: float | None, speedup: float | None, budget: float | None
) -> list[str]:
    """``--set``, ``--flops``, ``--speedup`` and ``--budget`` as the recipe reads them.

    Raises:
        UsageError: a budget is given twice.
    """
    if flops is not None and speedup is not None:
        raise UsageError("--flops and --speedup are one budget in two forms: give one of them")
    if speedup is not None:
        flops = 1 / speedup
    shares = {"flops": flops, "budget": budget}
    given = [f"{name}={share:.6g}" for name, share in shares.items() if share is not None]
    return [*(settings or []), *given]


Source = Annotated[str, typer.Argument(metavar="SOURCE", help=f"The model: {SOURCES}.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=be_verbose,
        help="Tell more on standard error, causes of errors among it.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|pretrained|random",
        help="Weights of the source: a .safetensors or .pth file, 'pretrained' from the model hub,"
        " or 'random' for speed work.",
    ),
]
Resolution = Annotated[
    str | None, typer.Option(metavar="HxW", help="Pixels of the image, where the source allows it.")
]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="Fix the length of the sequence, where the source leaves it open."),
]
Recipe = Annotated[
    str,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Built-in recipe, or a YAML file."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set an option of the recipe; may be repeated."
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share this part of the dense multiply-accumulates out over the layers.",
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(min=1.0, help="Ideal speed-up to share out: --speedup 2 is --flops 0.5."),
]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Run this share of the work of adaptive networks on average (acm, experts).",
    ),
]
_DATA = typer.Option(
    "--data",
    metavar="DATA",
    help="Labelled data: an image folder, an .npz file, a text file with labels, or the name of a"
    " built-in set; for causal language models a text file.",
)
Data = Annotated[str | None, _DATA]
DemandedData = Annotated[str, _DATA]
LearnData = Annotated[
    str | None,
    typer.Option(
        "--learn-data",
        metavar="DATA",
        help="Other data, for passes that learn or measure (diffrate, acm, atm, channels, clca, drop-blocks, dtem,"
        " dynamic-vit, early-exit, experts, patch-merger, relufy, sit, skip-tokens, sparsity);"
        " --data then only judges.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="What to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older output.")]
Target = Annotated[
    str,
    typer.Option(
        help="Back end: cpu, openvino, cuda, tensorrt, or tensorrt-rtx (also tensorrt-rtx:sm86+sm89);"
        " cuda and tensorrt-rtx engines are also made without a GPU; jetson-orin and jetson-thor make a"
        " folder that builds on the device."
    ),
]
MeantFor = Annotated[
    str,
    typer.Option(
        "--target",
        help="Back end that it is meant for: for GPUs token counts are rounded up to multiples of 8.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Arithmetic: fp32, fp16, with openvino or cuda bf16, or with --data of export int8."
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SIZES",
        help="Sizes an input will have: x=8x3x224x224 fixes them, x=1..32x3x224x224@8 is a range"
        " and its usual size; may be repeated.",
    ),
]
Size = Annotated[
    list[str] | None,
    typer.Option(metavar="AXIS=N", help="Size of a symbolic axis besides the batch."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; by default the physical cores, at most 8."),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Use only so many samples of the data, or windows of a text."),
]
Logits = Annotated[
    str | None, typer.Option(metavar="OUTPUT", help="The output that holds the logits.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Points of accuracy (hundredths) that may be lost, or percent that perplexity may rise;"
        " exit code 1 if more are."
    ),
]
MinSpeedup = Annotated[
    float | None,
    typer.Option(help="Speed-up demanded over the first candidate; exit code 1 if missed."),
]
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="ENGINE",
        help="The graph of steps that goes with a graph of prompts, both by 'core-neurons'.",
    ),
]
