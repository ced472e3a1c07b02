"""``thresher inspect``: what a model is made of, and a picture of where its tokens go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.learners import draw_words, read_words, show_words
from thresher.cli.learners import show_rows as show_learners
from thresher.cli.opening import axis_sizes, open_program
from thresher.cli.sparsity import draw as draw_sparsity
from thresher.cli.sparsity import measure, show_report
from thresher.compiler.errors import UsageError

if TYPE_CHECKING:
    from thresher.compiler.program import Program


def inspect(
    context: typer.Context,
    source: options.Source,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Follow the patches of this image.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="SENTENCE", help="Tell what each token of it runs.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PNG", help="The picture to write.")
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the graph, one line for each node, instead.")
    ] = False,
    sparsity: Annotated[
        bool,
        typer.Option("--sparsity", help="Measure activation sparsity on --data; -o draws it."),
    ] = False,
    data: options.Data = None,
    limit: options.Limit = None,
    seed: Annotated[int, typer.Option(help="Of the halves of the data.")] = 0,
    size: options.Size = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show sites, refusals, token counts and cost; with --image, draw which patches survive.

    Costs are those of --size, by default of the sizes that the model was traced at, and for causal
    language models of one step behind 256 tokens (--size past=256 --size sequence=1).

    With --sparsity, measure on --data which hidden neurons contribute nothing, and say what
    leaving them out is worth on each target.

    The picture has a panel for every block that changes the tokens: dropped patches are greyed out,
    patches that became one token have one colour; and one for every adaptive network: the lighter, the
    more learners a patch runs. --text tells, and with -o draws, the same for the tokens of a text.
    """
    if sparsity != (data is not None):
        raise UsageError("--sparsity and --data go together: give the data to measure on")
    if sparsity and (image is not None or graph):
        raise UsageError("--sparsity is a report of its own: leave out --image and --graph")
    for name in () if sparsity else ("limit", "seed"):
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            raise UsageError(f"--{name} is for --sparsity: give it too, or leave --{name} out")
    if text is not None and (sparsity or graph or image is not None):
        raise UsageError("--text is a report of its own: leave out --image, --graph and --sparsity")
    if not sparsity and text is None and (image is None) != (output is None):
        raise UsageError(
            "--image and -o go together: give the image to follow and the PNG to write"
        )
    told: dict[str, Any]
    with progress() as tell:
        program = open_program(source, options.wishes(weights, resolution, length), tell)
        if text is not None:
            tokens, runs = read_words(program, text)
            told = {"tokens": tokens}
            if output is not None:
                most = max(run.most for run in runs)
                draw_words(output, tokens, most)
                told["picture"] = str(output)
        elif data is not None:
            found = measure(program, data, limit, seed, tell)
            told = {"sparsity": found.to_json()}
            if output is not None:
                draw_sparsity(found, output)
                told["picture"] = str(output)
        elif graph:
            print(program.text(), end="")
            return
        elif image is not None and output is not None:
            tell("following the tokens", 0, 0)
            stages, learners = picture(program, image, output)
            told = {"picture": str(output), "stages": stages, "learners": learners}
        else:
            told = anatomy(program, axis_sizes(size))
    if json:
        show_json("inspect", {"source": source, **told})
    elif text is not None:
        show_words(text, tokens)
        if output is not None:
            show(f"written: {output}")
    elif data is not None:
        show_report(source, found)
        if output is not None:
            show(f"written: {output}")
    elif output is not None:
        title = f"{image} through {source}"
        words = {"alive": "patches alive", "merged": "merged into others", "dropped": "dropped"}
        _show_rows(title, stages, layer="block", tokens="tokens", **words)
        if learners:
            show_learners(f"Learners that tokens run, {image}", learners)
        show(f"written: {output}")
    else:
        _show(source, told)


def picture(
    program: Program, image: Path, output: Path
) -> tuple[list[dict[str, int]], list[dict[str, Any]]]:
    """Draw the patches of an image through a Program; returns counts for each stage and each adaptive network."""
    import numpy as np
    import torch

    from thresher.cli.draw import draw, grid_shape, stages
    from thresher.cli.inputs import image_sample
    from thresher.cli.learners import heats, rows, runs_of
    from thresher.compiler.analysis.finder import find_sites
    from thresher.compiler.ledger import final_positions, token_maps

    feeds, pixels = image_sample(program.info.preprocessing, image)
    runs = runs_of(program, feeds)
    if not program.ledger and not runs:
        raise UsageError(
            f"{program.info.source} drops and merges no tokens and has no adaptive networks, so there is"
            " nothing to draw: give a folder that 'thresher optimize' wrote"
        )
    headline = f"{image.name} through {program.info.source}"
    if not program.ledger:
        panels = heats(runs, find_sites(program).protected, *pixels.shape[:2])
        draw(output, pixels, panels, headline)
        return [], rows(runs)
    maps = token_maps(program, {name: torch.from_numpy(array) for name, array in feeds.items()})
    tokens = maps[0].slot.shape[1]
    where = [positions[0] for positions in final_positions(maps, tokens)]
    first = maps[0].entry
    shape = grid_shape(tokens - first.protected, *pixels.shape[:2])
    titles = [f"after block {m.entry.layer}: {m.kept.shape[1]} of {tokens} tokens" for m in maps]
    found = stages(titles, where, first.protected, shape)
    methods = ", ".join(dict.fromkeys(entry.method for entry in program.ledger))
    warm = heats(runs, first.protected, *pixels.shape[:2]) if runs else []
    draw(output, pixels, [*found, *warm], f"{headline}, {methods}")
    counts = [
        {
            "layer": m.entry.layer,
            "tokens": m.kept.shape[1],
            "alive": int((stage.owner >= 0).sum()),
            "merged": int((stage.owner >= 0).sum() - np.unique(stage.owner[stage.owner >= 0]).size),
            "dropped": int((stage.owner < 0).sum()),
        }
        for m, stage in zip(maps, found, strict=True)
    ]
    return counts, rows(runs)


def anatomy(program: Program, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Contract, history, sites, refusals and cost of a Program as plain data.

    Args:
        sizes: of symbolic axes, for the cost.
    """
    from thresher.compiler.analysis.axes import hint_of
    from thresher.compiler.analysis.cost import parameters, symbol_sizes, total_macs
    from thresher.compiler.analysis.finder import find_sites
    from thresher.runtime.runner import tensor_info
    from thresher.runtime.sample import timed_sizes

    specs = [tensor_info(spec) for spec in program.inputs]
    sizes = timed_sizes(specs, sizes, program.info.preprocessing)
    symbols = symbol_sizes(program, sizes)
    sites = find_sites(program)
    reduced = bool(
        program.ledger
    )  # then sites were used, and what was refused stands in the history
    refusals = [r for record in program.history for r in record.refused]
    return {
        "info": asdict(program.info),
        "stage": program.stage,
        "inputs": [asdict(spec) for spec in program.inputs],
        "outputs": [asdict(spec) for spec in program.outputs],
        "parameters": parameters(program),
        "macs": total_macs(program.graph, sizes=symbols),
        "sizes": sizes,
        "tokens": hint_of(sites.tokens),
        "protected": sites.protected,
        "class_token": sites.class_token,
        "history": [asdict(record) for record in program.history],
        "ledger": [asdict(entry) for entry in program.ledger],
        "sites": [
            {"layer": site.layer, "path": site.path, "node": site.stream.name}
            for site in sites.sites
            if not reduced
        ],
        "refusals": [asdict(r) for r in (refusals if reduced else sites.refusals)],
        "blocks": block_macs(program, symbols),
    }


def block_macs(program: Program, symbols: Mapping[str, int] | None = None) -> dict[str, int]:
    """Multiply-accumulates of one item by block, in the order in which they run."""
    from thresher.compiler.analysis.cost import node_cost
    from thresher.compiler.program import module_path
    from thresher.runtime.provenance import block_names

    paths = [
        (module_path(node), node) for node in program.graph.nodes if node.op == "call_function"
    ]
    names = block_names(path for path, _ in paths)
    blocks: dict[str, int] = {}
    for path, node in paths:
        blocks[names[path]] = blocks.get(names[path], 0) + node_cost(node, sizes=symbols).macs
    return {name: macs for name, macs in blocks.items() if macs}


def _show(source: str, data: dict[str, Any]) -> None:
    info = data["info"]
    at = ", ".join(f"{axis} {size}" for axis, size in data["sizes"].items())
    facts = [
        (
            "source",
            f"{info['source']}, weights {info['weights']}, licence {info['licence'] or 'unknown'}",
        ),
        *((f"input {s['name']}", f"{s['dtype']} {list(s['shape'])}") for s in data["inputs"]),
        *((f"output {s['name']}", f"{s['dtype']} {list(s['shape'])}") for s in data["outputs"]),
        ("parameters", f"{data['parameters'] / 1e6:.2f} M"),
        (
            "cost of one item",
            f"{data['macs'] / 1e9:.3g} G multiply-accumulates{f' at {at}' if at else ''}",
        ),
        *(
            [("tokens", f"{data['tokens']}, the first {data['protected']} protected")]
            if data["tokens"]
            else []
        ),
        ("passes", ", ".join(record["name"] for record in data["history"]) or "none yet"),
    ]
    show(table(source, ("", ""), facts))
    _show_rows(
        "Tokens", data["ledger"], layer="block", method="by", tokens_in="tokens", tokens_out="left"
    )
    _show_rows(
        "Sites, where tokens may go", data["sites"], layer="block", path="attention", node="node"
    )
    _show_rows("Refused", data["refusals"], node="node", reason="reason")
    total = max(1, data["macs"])
    rows = [(n, f"{macs / 1e6:.4g}", f"{macs / total:.1%}") for n, macs in data["blocks"].items()]
    show(table("Cost of one item", ("block", "M MACs", "share"), rows))


def _show_rows(title: str, rows: Sequence[dict[str, Any]], **head: str) -> None:
    """A table of the fields in ``head`` under its texts, if there are rows."""
    if rows:
        show(table(title, list(head.values()), [[row[key] for key in head] for row in rows]))
