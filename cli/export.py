"""``thresher export``: a Program becomes an engine folder."""

from __future__ import annotations

import json as jsons
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.opening import (
    MANIFEST,
    Watched,
    answers_with_classes,
    is_engine,
    open_measured,
    open_program,
    recipe_of,
)
from thresher.cli.passes import cost_text, counts_text
from thresher.compiler.errors import UsageError
from thresher.compiler.files import SERVING

if TYPE_CHECKING:
    from thresher.runtime import Manifest


SHAPING = (  # an engine's making
    "target", "precision", "weights", "resolution", "length", "shape", "data", "calibrate", "max_drop",
)  # fmt: skip


def export(
    context: typer.Context,
    source: options.Source,
    output: options.Output,
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    shape: options.Shape = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="triton",
            help="Write the model's folder in a repository of this model server, named after PATH;"
            " SOURCE may then be an engine that is there already.",
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --serve and target cpu: put the native kernels beside the model, and tell the"
            " server to load them from FILE, the path that it sees.",
        ),
    ] = None,
    data: options.Data = None,
    calibrate: Annotated[
        int,
        typer.Option(
            min=1, help="Samples of the data that ranges of int8 are observed on, spread evenly."
        ),
    ] = 128,
    max_drop: options.MaxDrop = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Lower a model to an engine folder: model.onnx, the back end's files, manifest.json.

    int8 rounds the linear layers by what it observes on --data, labelled or not.  With --data the
    engine is compared with the model on it instead of on random inputs.  Exit code 1 when they differ.
    """
    if kernels is not None and serve is None:
        raise UsageError("--kernels says what a server loads: give --serve too, or leave it out")
    if max_drop is not None and data is None:
        raise UsageError("--max-drop needs labelled data: give --data, or leave it out")
    with progress() as tell:
        from thresher.runtime import export as build
        from thresher.runtime.bundle import ready
        from thresher.runtime.manifest import read
        from thresher.runtime.serving import Wishes, copy_engine, served

        finished = serve is not None and is_engine(source)
        if finished:
            _refuse_shaping(context, source)
            target = read(Path(source)).target
        wishes = Wishes(threads=threads, kernels=kernels)
        with (
            nullcontext(output)
            if serve is None
            else served(output, serve, target, wishes, overwrite=overwrite)
        ) as folder:
            if finished:
                manifest = copy_engine(Path(source), folder)
            else:
                ready(target, precision, folder, overwrite=overwrite, calibrated=data is not None)
                program = open_program(source, options.wishes(weights, resolution, length), tell)
                dataset = None if data is None else open_measured(data, program)
                classify = max_drop is not None or answers_with_classes(program)
                watched = None if max_drop is not None else calibrate  # a drop is judged on all
                manifest = build(
                    program,
                    folder,
                    target=target,
                    precision=precision,
                    threads=threads,
                    overwrite=overwrite,
                    recipe=recipe_of(source),
                    shapes=shape or (),
                    data=dataset and Watched(dataset, watched, tell, classify=classify),
                    samples=calibrate,
                    max_drop=max_drop,
                    tell=tell,
                ).manifest
    engine = output / folder.name if serve else output
    serving = jsons.loads((output / SERVING).read_text()) if serve else {}
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if json:
        told = {"engine": str(engine), "bytes": size, **manifest.model_dump()}
        show_json("export", {**told, "serving": serving} if serve else told)
        return
    rows = [
        ("source", manifest.source_name),
        ("weights", manifest.source.get("weights", "")),
        ("target", f"{target}, {precision}"),
        ("inputs", ", ".join(f"{i.name} {list(i.shape)}" for i in manifest.inputs)),
        ("sizes", _sizes(manifest)),
        ("outputs", ", ".join(f"{o.name} {list(o.shape)}" for o in manifest.outputs)),
        ("tokens", counts_text(manifest.tokens or ())),
        ("predicted", _predicted(manifest)),
        ("memory", _memory(manifest)),
        ("built", _built(manifest)),
        ("cache", manifest.cache),
        ("calibrated", _calibration(manifest)),
        ("against eager", _agreement(manifest)),
        ("quality", _quality(manifest)),
        ("files", ", ".join([*manifest.files, MANIFEST])),
        ("size", f"{size / 1e6:.1f} MB"),
        ("serve with", " ".join(serving.get("command", ()))),
        *(("note", note) for note in serving.get("notes", ())),
    ]
    show(table(str(output), ("", ""), [row for row in rows if row[1]]))


def _refuse_shaping(context: typer.Context, source: str) -> None:
    """An engine that is there already is served as it is."""
    for name in SHAPING:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            raise UsageError(
                f"{source} is an engine already: leave --{name.replace('_', '-')} out, or give the SOURCE that it was"
                " made from"
            )


def _sizes(manifest: Manifest) -> str:
    """Of the symbolic axes, where they have bounds."""
    told = []
    for axis, (low, high) in manifest.ranges.items():
        usual = manifest.usual.get(axis)
        bounds = str(low) if low == high else f"{low} to {'any' if high is None else high}"
        told.append(f"{axis} {bounds}{f', usually {usual}' if usual and low != high else ''}")
    return "; ".join(told)


def _predicted(manifest: Manifest) -> str:
    found = manifest.prediction
    return cost_text(found.dense_macs, found.macs) if found else ""


def _memory(manifest: Manifest) -> str:
    """The estimate that was made before the build."""
    from thresher.runtime.footprint import Footprint

    return f"about {Footprint(**manifest.estimate)}" if manifest.estimate else ""


def _agreement(manifest: Manifest) -> str:
    """The largest difference that the check before the folder got its name has seen."""
    if not manifest.verified:
        return ""
    outputs = manifest.verified["outputs"].values()
    worst = max(output["relative"] for output in outputs)
    allowed = manifest.verified["tolerance"]
    provider = manifest.verified["run by"]
    return f"differs by {worst:.2g} of the output's scale, {allowed:.2g} allowed ({provider})"


def _calibration(manifest: Manifest) -> str:
    told = manifest.calibration
    if told is None:
        return ""
    return f"{told['layers']} linear layers on {told['samples']} samples of {told['data']}"


def _quality(manifest: Manifest) -> str:
    """Accuracy before and after, where the check had labels."""
    told = (manifest.verified or {}).get("quality")
    if told is None:
        return ""
    return (
        f"right on {told['accuracy_b']:.2%}, the model on {told['accuracy_a']:.2%} of {told['n']}"
        f" samples: {told['difference']:+.2f} points (standard error {told['standard_error']:.2f})"
    )


def _built(manifest: Manifest) -> str:
    """What a back end that compiles tells of its engine."""
    told = manifest.built
    if "layers" not in told:
        return str(told.get("next", ""))
    layers = ", ".join(f"{count} {kind}" for kind, count in told["layers"].items())
    room = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in told["bytes"].items())
    return f"{told['steps']}; layers: {layers}; {room}"
