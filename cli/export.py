"""``thresher export``: a Program becomes an engine folder."""

from __future__ import annotations

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.opening import open_program, recipe_of


def export(
    source: options.Source,
    output: options.Output,
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Lower a model to an engine folder: model.onnx, the back end's files, manifest.json."""
    with progress() as tell:
        from thresher.runtime import export as build
        from thresher.runtime.bundle import ready

        ready(target, precision, output, overwrite=overwrite)
        program = open_program(source, options.wishes(weights, resolution, length), tell)
        tell(f"building for {target}", 0, 0)
        engine = build(
            program,
            output,
            target=target,
            precision=precision,
            threads=threads,
            overwrite=overwrite,
            recipe=recipe_of(source),
        )
    manifest = engine.manifest
    size = sum(file.stat().st_size for file in output.iterdir())
    if json:
        show_json("export", {"engine": str(output), "bytes": size, **manifest.model_dump()})
        return
    rows = [
        ("source", manifest.source_name),
        ("weights", manifest.source.get("weights", "")),
        ("target", f"{target}, {precision}"),
        ("inputs", ", ".join(f"{i.name} {list(i.shape)}" for i in manifest.inputs)),
        ("outputs", ", ".join(f"{o.name} {list(o.shape)}" for o in manifest.outputs)),
        ("files", ", ".join([*manifest.files, "manifest.json"])),
        ("size", f"{size / 1e6:.1f} MB"),
    ]
    show(table(f"{output}", ("", ""), rows))
