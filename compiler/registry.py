"""Passes by name.  Naming them imports nothing; a pass is imported when it is first used.

Packages add passes through the entry-point group ``thresher.passes``: name = ``"module:Class"``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import MissingRequirementError, UsageError, nearest

if TYPE_CHECKING:
    from thresher.compiler.contract import Pass

GROUP = "thresher.passes"
BUILT_IN = {
    "acm": "thresher.passes.adaptive.acm:Acm",
    "atm": "thresher.passes.tokens.atm:Atm",
    "ats": "thresher.passes.tokens.ats:Ats",
    "channels": "thresher.passes.sparsity.channels:ChannelPruning",
    "clca": "thresher.passes.tokens.clca.clca:Clca",
    "cleanup": "thresher.passes.cleanup:Cleanup",
    "core-neurons": "thresher.passes.sparsity.core:CoreNeurons",
    "diffrate": "thresher.passes.tokens.diffrate:DiffRate",
    "drop-blocks": "thresher.passes.depth.drop_blocks:DropBlocks",
    "dtem": "thresher.passes.tokens.modules.embedding:Dtem",
    "dynamic-vit": "thresher.passes.tokens.modules.prediction:DynamicVit",
    "early-exit": "thresher.passes.exits.early_exit:EarlyExit",
    "evit": "thresher.passes.tokens.methods:Evit",
    "experts": "thresher.passes.experts.experts:Experts",
    "max-min": "thresher.passes.tokens.methods:MaxMin",
    "patch-merger": "thresher.passes.tokens.modules.merger:PatchMerger",
    "pitome": "thresher.passes.tokens.methods:Pitome",
    "random": "thresher.passes.tokens.methods:RandomDrop",
    "relufy": "thresher.passes.sparsity.relufy:Relufy",
    "sit": "thresher.passes.tokens.modules.slimming:Sit",
    "skip-tokens": "thresher.passes.depth.skip_tokens:SkipTokens",
    "sparsity": "thresher.passes.sparsity.skip:Sparsity",
    "tail-slice": "thresher.passes.tokens.tail_slice:TailSlice",
    "tome": "thresher.passes.tokens.methods:Tome",
    "tomesd": "thresher.passes.tokens.tomesd:Tomesd",
    "topk-norm": "thresher.passes.tokens.methods:TopkNorm",
    "zero-tprune": "thresher.passes.tokens.zero_tprune:ZeroTPrune",
}


def names() -> tuple[str, ...]:
    """All known passes, sorted."""
    return tuple(sorted({*BUILT_IN, *_plug_ins()}))


@cache
def load(name: str) -> type[Pass[Any]]:
    """The class of a pass.

    Raises:
        UsageError: there is no such pass, or two plug-ins claim the name.
        MissingRequirementError: a plug-in cannot be imported.
        ContractError: what was registered is no proper pass.
    """
    claims = _plug_ins().get(name, ())
    owners = [_owner(claim) for claim in claims] + ["thresher itself"] * (name in BUILT_IN)
    if not owners:
        raise UsageError(f"there is no pass {name!r}{nearest(name, names())}")
    if len(owners) > 1:
        raise UsageError(
            f"pass {name!r} is offered by {' and by '.join(sorted(owners))}: uninstall all but one"
        )
    found = _import_plug_in(claims[0]) if claims else _import(BUILT_IN[name])
    return _checked(name, found, owners[0])


def _import(path: str) -> object:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _import_plug_in(claim: EntryPoint) -> object:
    try:
        return claim.load()
    except (ImportError, AttributeError) as error:
        raise MissingRequirementError(
            f"pass {claim.name!r} of {_owner(claim)} cannot be imported ({error}):"
            " reinstall or uninstall that package"
        ) from error


def _checked(name: str, found: object, owner: str) -> type[Pass[Any]]:
    from thresher.compiler.contract import ContractError, Pass, check_declaration

    if not isinstance(found, type) or not issubclass(found, Pass):
        raise ContractError(f"what {owner} registers as pass {name!r} is no subclass of Pass")
    check_declaration(found)
    if found.name != name:
        raise ContractError(f"{owner} registers pass {name!r} and its class says {found.name!r}")
    return found


@cache
def _plug_ins() -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _owner(claim: EntryPoint) -> str:
    distribution = claim.dist.name if claim.dist is not None else "an unnamed distribution"
    return f"{distribution} ({claim.value})"
