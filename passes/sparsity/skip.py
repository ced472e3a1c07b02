"""Thresholds on the inputs of linears: what is small enough is skipped, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.cost import parameters
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program, Refusal
from thresher.kernels import native
from thresher.passes.learning import calibration, saved
from thresher.passes.sparsity import criterion, payoff
from thresher.passes.sparsity.allocation import FAR, Even, Greedy
from thresher.passes.sparsity.criterion import Judge
from thresher.passes.sparsity.gated import gated_form
from thresher.passes.sparsity.insert import Skip, insert
from thresher.passes.sparsity.report import MANY, item_tokens
from thresher.passes.sparsity.sites import Found, Input, find
from thresher.passes.sparsity.thresholds import Thresholds

Kind: TypeAlias = Literal["qkv", "out", "up", "down"]
LEAST_ITEMS = 8
DEFAULT_SPARSITY = 0.5
MOST = 0.99  # sparsity at which the search for a rise ends
EVERY_TOKEN = 2**31 - 1


class SparsityOptions(Options):
    """Which inputs are skipped, and how many: at most one of ``sparsity`` and ``rise``."""

    method: Annotated[
        Literal["teal", "wina", "scap", "cett", "cats"],
        Field(description="what is small: the input (teal), the input times its column's norm (wina),"
            " its distance to the mode (scap), a neuron's contribution (cett), the gate (cats)"),
    ] = "teal"  # fmt: skip
    sparsity: Annotated[
        float | None,
        Field(ge=0, lt=1, description="share of the inputs to skip, each counted by its weights"),
    ] = None
    rise: Annotated[
        float | None,
        Field(
            gt=0,
            description="per cent by which the loss may rise on the data, half of which is held out"
            " to tell how much it rises there",
        ),
    ] = None
    spread: Annotated[
        Literal["even", "greedy"],
        Field(
            description="the same share everywhere, or in each block more of what moves its output"
            " least (TEAL's allocation; takes much longer)"
        ),
    ] = "even"
    sites: Annotated[
        tuple[Kind, ...] | None,
        Field(
            description="which linears: qkv, out, up, down; by default all, for cett and cats down"
        ),
    ] = None
    most_tokens: Annotated[
        int, Field(ge=1, description="skip only where at most so many tokens pass together")
    ] = 1
    weights: Annotated[
        Literal["float32", "bfloat16"],
        Field(
            description="type in which weights of linears that skip are kept; bfloat16 halves the bytes"
            " of the file and of what a step reads, not the memory"
        ),
    ] = "float32"
    allow: Annotated[
        bool, Field(description="also where it cannot pay, for experiments with quality")
    ] = False
    items: Annotated[int, Field(ge=LEAST_ITEMS, description="items of the data to measure on")] = (
        128
    )
    calibration: Annotated[
        Path | None, Field(description="thresholds found before, instead of data")
    ] = None

    @model_validator(mode="after")
    def _fits(self) -> SparsityOptions:
        if self.sparsity is not None and self.rise is not None:
            raise ValueError("give one budget only, not sparsity and rise")
        only_down = self.method in ("cett", "cats")
        if only_down and self.sites is not None and set(self.sites) != {"down"}:
            raise ValueError(f"method {self.method} is made for sites: [down]")
        if only_down and self.spread == "greedy":
            raise ValueError(f"method {self.method} has one input in a block: nothing to spread")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.method in ("cett", "cats"):
            return ("down",)
        return self.sites or ("qkv", "out", "up", "down")

    @property
    def share(self) -> float:
        """The share of the inputs that is asked for where no rise is."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def facts(self) -> dict[str, str]:
        """What thresholds answer to."""
        asked = {"sparsity": self.share} if self.rise is None else {"rise": self.rise}
        told = {name: f"{amount:g}" for name, amount in asked.items()}
        if self.rise is not None:  # rounded weights have their part in it
            told["weights"] = self.weights
        return {"method": self.method, "spread": self.spread} | told


class Sparsity(Pass[SparsityOptions]):
    """Skip the inputs of linears that are small, with thresholds found on data.

    teal: the quantile of ``|x|`` of each tensor (Liu et al., ICLR 2025); wina: ``t / c_i`` with c_i the norm
    of the weights' column over all matrices that read x (2025); scap: ``|x - m|`` with the mode m folded
    into the bias (2024); cett: ``|h_i| |W[:, i]| < eps_l`` with one CETT for all layers (Luo et al.,
    ICML 2025); cats: ``|act(gate)|`` (Lee et al., COLM 2024).  It pays where few tokens pass at once,
    as in decoding; elsewhere the pass refuses with the arithmetic, and ``channels`` is the way.
    """

    name = "sparsity"
    summary = (
        "skip small inputs of linears where few tokens pass at once, with thresholds found on data"
    )
    Options = SparsityOptions
    needs_data: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        found = find(program)
        chosen = [entry for entry in found.inputs if entry.kind in self.options.kinds]
        refused = [*found.refusals]
        if self.options.method == "cats":
            plain = {f.layer: f for f in found.ffns if f.gate is None}
            refused += [
                Refusal(f.down.name, f"{f.path} has no gate to decide by, activated by itself")
                for f in plain.values()
            ]
            chosen = [entry for entry in chosen if entry.layer not in plain]
        if not chosen:
            return PassResult(program, len(found.inputs), 0, tuple(refused))
        digest = weights_digest(program)
        if self.options.calibration is not None:
            path = self.options.calibration
            sites = [entry.name for entry in chosen]
            tensors = saved.read(path, digest, self.name, sites, self.options.facts)
            told: dict[str, Any] = {}
        else:
            tensors, told = self._calibrate(program, context, found, chosen)
        skips = self._skips(chosen, tensors, found.ffns)
        exported = self._insert(program, skips, self.options.most_tokens)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        return PassResult(
            dataclasses.replace(program, exported=exported),
            len(found.inputs),
            len(chosen),
            tuple(refused),
            told,
            self.options.model_copy(update={"calibration": Path(file)}),
            Calibration(file, digest, tensors, self.options.facts),
        )

    def _insert(
        self, program: Program, skips: Mapping[tuple[fx.Node, ...], Skip], most_tokens: int
    ) -> ExportedProgram:
        narrow = self.options.weights == "bfloat16"
        return insert(program, skips, most_tokens, self.name, narrow=narrow)

    def _skips(
        self,
        chosen: Sequence[Input],
        tensors: Mapping[str, Tensor],
        ffns: Sequence[FFN],
    ) -> dict[tuple[fx.Node, ...], Skip]:
        of = {ffn.layer: ffn for ffn in ffns} if self.options.method == "cats" else {}
        skips: dict[tuple[fx.Node, ...], Skip] = {}
        for entry in chosen:
            shares = tensors.get(f"active.{entry.name}", torch.empty(0)).tolist()
            union = dict(zip(MANY, shares, strict=False))
            skips[entry.linears] = Skip(
                tensors[f"threshold.{entry.name}"],
                float(tensors.get(f"shift.{entry.name}", torch.zeros(()))),
                of.get(entry.layer),
                payoff.at(union, self.options.most_tokens),
            )
        return skips

    # --- calibration --------------------------------------------------------------------------

    def _calibrate(
        self,
        program: Program,
        context: Context,
        found: Found,
        chosen: Sequence[Input],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Thresholds (and shifts) by site, and what to tell about them.

        Raises:
            RefusedError: skipping cannot pay, with the arithmetic.
        """
        asked, data = self.options.rise, context.data
        assert data is not None
        held: list[int] = []
        if asked is None:
            items = calibration.chosen_items(data, self.options.items, LEAST_ITEMS)
        else:
            items, held = calibration.halves(data, self.options.items, LEAST_ITEMS, context.seed)
        method = self._thresholds(program, context, found, chosen, items)
        spread: Even | Greedy = Even(chosen)
        if self.options.spread == "greedy":
            spread = self._greedy(program, context, found, chosen, method)
        if asked is None:
            amount, told = self.options.share, dict[str, Any]()
        else:

            def changed(amount: float) -> Program:
                skips = self._skips(chosen, method.at(spread.at(amount)), found.ffns)
                exported = self._insert(program, skips, EVERY_TOKEN)
                return dataclasses.replace(program, exported=exported)

            kind = criterion.choose(program, data)
            ours, others = (Judge(program, data, s, kind, context.batch) for s in (items, held))
            top = 1.0 if method.by_cett else MOST if isinstance(spread, Even) else FAR
            amount, told = _searched(asked, top, changed, ours, others)
        shares = spread.at(amount)
        if isinstance(spread, Greedy):
            told |= spread.told(amount)
        tensors = method.at(shares)
        unions = method.unions(tensors, MANY)
        for name, union in unions.items():
            tensors[f"active.{name}"] = torch.tensor(list(union.values()), dtype=torch.float64)
        verdict = self._demand_gain(program, found, chosen, unions)
        if verdict.pays and not _kernels_built():
            needs = f"{verdict.sentence}, only with the kernels: thresher kernels build"
            told["note"] = "; ".join(filter(None, [told.get("note"), needs]))
        sparsity = {name: 1 - shares.get(1, 1.0) for name, shares in unions.items()}
        return tensors, told | {"sparsity": sparsity, "union": unions}

    def _thresholds(
        self,
        program: Program,
        context: Context,
        found: Found,
        chosen: Sequence[Input],
        items: Sequence[int],
    ) -> Thresholds:
        options, sites = self.options, " ".join(entry.name for entry in chosen)
        identity = {"sites": sites, **options.facts}
        by_cett = options.method == "cett" and options.rise is not None
        return Thresholds(
            program, context, options.method, by_cett, found.ffns, chosen, items, identity
        )

    def _greedy(
        self,
        program: Program,
        context: Context,
        found: Found,
        chosen: Sequence[Input],
        method: Thresholds,
    ) -> Greedy:
        until = self.options.share if self.options.rise is None else FAR
        return Greedy(
            program, context, found.ffns, chosen, method.skip, until, method.items, method.identity
        )

    def _demand_gain(
        self,
        program: Program,
        found: Found,
        chosen: Sequence[Input],
        unions: Mapping[str, Mapping[int, float]],
    ) -> payoff.Verdict:
        tokens = 1 if criterion.is_causal(program) else item_tokens(program)
        stored = parameters(program)
        also: dict[int, int] = {}  # rows of up that go with the neurons of a gated network
        if self.options.method == "cats":
            forms = {ffn: gated_form(ffn) for ffn in found.ffns}
            also = {ffn.layer: ffn.width * form.width for ffn, form in forms.items() if form}
        parts = {}
        for entry in chosen:
            work = entry.weights + also.get(entry.layer, 0)
            share, outputs = work / stored, work // entry.width
            parts[entry.name] = payoff.Part(share, unions[entry.name], entry.width, outputs)
        verdict = payoff.verdict("cpu", tokens, parts, self.options.weights)
        if self.options.allow or (verdict.pays and tokens <= self.options.most_tokens):
            return verdict
        mean = {m: sum(u.get(m, 1.0) for u in unions.values()) / len(unions) for m in MANY}
        table = ", ".join(f"{share:.0%} for {m}" for m, share in mean.items())
        raise RefusedError(
            f"skipping inputs token by token cannot pay in {program.info.source}, which takes {tokens}"
            f" tokens at once: of the inputs are needed {table} tokens together; {verdict.sentence};"
            " use the pass channels, or say allow: true to try the quality all the same"
        )


def _searched(
    asked: float, top: float, changed: Callable[[float], Program], ours: Judge, held: Judge
) -> tuple[float, dict[str, Any]]:
    """The amount at which the loss rises as asked, and what it comes to on items held out; in per cent."""
    amount, share = criterion.largest(lambda a: ours.rise_of(changed(a)), asked / 100, top)
    reached, held_out = 100 * share, 100 * held.rise_of(changed(amount))
    kind = ours.criterion.kind
    note = (
        f"{kind} rises by {reached:.2f}% on the {ours.items} items that thresholds were found on and"
        f" by {held_out:.2f}% on {held.items} others"
    )
    if share > asked / 100 + criterion.TOLERANCE:
        note += (
            f" ({asked:g}% was asked: so much is lost where nothing is skipped, so leave"
            " weights=bfloat16 out or allow more)"
        )
    elif share < asked / 100 - criterion.TOLERANCE:
        note += f" ({asked:g}% was asked: the search found nothing nearer below it)"
    told = {"rise": reached, "held-out rise": held_out, "judged by": kind, "note": note}
    return amount, told


def _kernels_built() -> bool:
    """Whether engines here would load the kernels whose factors the verdict counts with."""
    try:
        return native.wanted() is not None
    except native.KernelError:  # the engine says what is wrong with them
        return False
