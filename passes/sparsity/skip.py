"""Thresholds on the inputs of linears: what is small enough is skipped, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx
from torch.export import ExportedProgram

from thresher.compiler.analysis.cost import parameters
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, Refusal
from thresher.kernels import native
from thresher.passes.sparsity import calibration, criterion, payoff
from thresher.passes.sparsity.cett import Cett, Union
from thresher.passes.sparsity.criterion import Judge
from thresher.passes.sparsity.gated import gated_form
from thresher.passes.sparsity.insert import Skip, insert
from thresher.passes.sparsity.quantiles import Mode, Quantiles
from thresher.passes.sparsity.report import MANY, item_tokens
from thresher.passes.sparsity.sites import FFN, Found, Input, find
from thresher.passes.sparsity.weights import weights_of

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
        float | None, Field(ge=0, lt=1, description="share of the inputs to skip at every site")
    ] = None
    rise: Annotated[
        float | None, Field(gt=0, description="per cent by which the loss may rise on the data")
    ] = None
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
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.method in ("cett", "cats"):
            return ("down",)
        return self.sites or ("qkv", "out", "up", "down")

    @property
    def facts(self) -> dict[str, str]:
        """What thresholds answer to."""
        asked = {"sparsity": self.sparsity, "rise": self.rise}
        if self.sparsity is None and self.rise is None:
            asked["sparsity"] = DEFAULT_SPARSITY
        return {"method": self.method} | {k: f"{v:g}" for k, v in asked.items() if v is not None}


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

    def demand_data(self, context: Context) -> None:
        if self.options.calibration is None:
            super().demand_data(context)

    def run(self, program: Program, context: Context) -> PassResult:
        found = find(program)
        chosen = [entry for entry in found.inputs if entry.kind in self.options.kinds]
        refused = [*found.refusals]
        if self.options.method == "cats":
            plain = {f.layer: f for f in found.ffns if f.gate is None}
            refused += [
                Refusal(f.down.name, f"{f.path} has no gate to decide by") for f in plain.values()
            ]
            chosen = [entry for entry in chosen if entry.layer not in plain]
        if not chosen:
            return PassResult(program, len(found.inputs), 0, tuple(refused))
        digest = calibration.weights_digest(program)
        if self.options.calibration is not None:
            path = self.options.calibration
            sites = [entry.name for entry in chosen]
            tensors = calibration.read(path, digest, self.name, sites, self.options.facts)
            told: dict[str, Any] = {}
        else:
            tensors, told = self._calibrate(program, context, found, chosen, digest)
        skips = self._skips(chosen, tensors, found.ffns)
        exported = self._insert(program, skips, self.options.most_tokens)
        file = f"{calibration.numbered(program, self.name)}.safetensors"
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
        digest: str,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Thresholds (and shifts) by site, and what to tell about them.

        Raises:
            RefusedError: skipping cannot pay, with the arithmetic.
        """
        data = context.data
        assert data is not None
        items = calibration.chosen_items(data, self.options.items, LEAST_ITEMS)
        method = _Method(program, context, self.options, found.ffns, chosen, items, digest)
        told: dict[str, Any] = {}
        if self.options.rise is None:
            asked = self.options.sparsity
            tensors = method.at(DEFAULT_SPARSITY if asked is None else asked)
        else:
            judge = Judge(program, data, items, criterion.choose(program, data), context.batch)

            def rise(amount: float) -> float:
                skips = self._skips(chosen, method.at(amount), found.ffns)
                changed = self._insert(program, skips, EVERY_TOKEN)
                return judge.rise_of(dataclasses.replace(program, exported=changed))

            top = 1.0 if self.options.method == "cett" else MOST
            amount, reached = criterion.largest(rise, self.options.rise / 100, top)
            tensors = method.at(amount)
            told = {"rise": 100 * reached, "judged by": judge.criterion.kind}
        unions = method.unions(tensors)
        for name, union in unions.items():
            shares = torch.tensor(list(union.values()), dtype=torch.float64)
            tensors[f"active.{name}"] = shares
        verdict = self._demand_gain(program, found, chosen, unions)
        if verdict.pays and not _kernels_built():
            told["note"] = f"{verdict.sentence}, only with the kernels: thresher kernels build"
        sparsity = {name: 1 - shares.get(1, 1.0) for name, shares in unions.items()}
        return tensors, told | {"sparsity": sparsity, "union": unions}

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
        layers = {
            entry.name: ((entry.weights + also.get(entry.layer, 0)) / stored, unions[entry.name])
            for entry in chosen
        }
        verdict = payoff.verdict("cpu", tokens, layers, self.options.weights)
        if self.options.allow or (verdict.pays and tokens <= self.options.most_tokens):
            return verdict
        mean = {m: sum(u.get(m, 1.0) for u in unions.values()) / len(unions) for m in MANY}
        table = ", ".join(f"{share:.0%} for {m}" for m, share in mean.items())
        raise RefusedError(
            f"skipping inputs token by token cannot pay in {program.info.source}, which takes {tokens}"
            f" tokens at once: of the inputs are needed {table} tokens together; {verdict.sentence};"
            " use the pass channels, or say allow: true to try the quality all the same"
        )


def _kernels_built() -> bool:
    """Whether engines here would load the kernels whose factors the verdict counts with."""
    try:
        return native.wanted() is not None
    except native.KernelError:  # the engine says what is wrong with them
        return False


class _Method:
    """One method's thresholds as a function of how much is to go; measured once."""

    def __init__(
        self,
        program: Program,
        context: Context,
        options: SparsityOptions,
        ffns: Sequence[FFN],
        chosen: Sequence[Input],
        items: Sequence[int],
        digest: str,
    ) -> None:
        self.program, self.context, self.options = program, context, options
        self.chosen, self.items = chosen, items
        self.identity = {"digest": digest, **options.facts}
        gates = {ffn.layer: ffn.gate for ffn in ffns}
        self.node = {
            entry.name: (gates[entry.layer] if options.method == "cats" else None) or entry.node
            for entry in chosen
        }
        self.norms = {entry.name: self._norms(entry) for entry in chosen}
        self.shifts = self._shifts() if options.method == "scap" else {}
        self.curves: dict[str, Cett] = {}
        self.sizes: dict[str, Quantiles] = {}
        if options.method == "cett":
            downs = weights_of(program, [entry.linears[0] for entry in chosen])
            self.curves = {e.name: Cett(w) for e, w in zip(chosen, downs, strict=True)}
            self._collect(self.curves, "cett")
        else:
            scaled = options.method == "wina"
            self.sizes = {
                name: Quantiles(norms if scaled else None, self.shifts.get(name, 0.0))
                for name, norms in self.norms.items()
            }
            self._collect(self.sizes, "sizes")

    def at(self, amount: float) -> dict[str, Tensor]:
        """Thresholds ``[I]`` and shifts; ``amount`` is a sparsity, for cett and a rise a CETT."""
        found = {}
        for entry in self.chosen:
            norms = self.norms[entry.name]
            if self.options.method == "cett":
                threshold = self._eps(entry.name, amount) / norms
            else:
                size = self.sizes[entry.name].at(amount)
                even = torch.full((entry.width,), size)
                threshold = size / norms if self.options.method == "wina" else even
            found[f"threshold.{entry.name}"] = threshold.float()
            if self.shifts:
                found[f"shift.{entry.name}"] = torch.tensor(self.shifts[entry.name])
        return found

    def unions(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, float]]:
        """Measured share of the inputs that any of M tokens needs, by site."""
        unions = {
            e.name: Union(tensors[f"threshold.{e.name}"], MANY, self.shifts.get(e.name, 0.0))
            for e in self.chosen
        }
        self._collect(unions, "unions")
        return {name: union.shares() for name, union in unions.items()}

    def _eps(self, name: str, amount: float) -> float:
        curve = self.curves[name].curve()
        return curve.threshold(amount) if self.options.rise is not None else curve.sparse(amount)

    def _norms(self, entry: Input) -> Tensor:
        """``[I]``: length of each column over all matrices that read the tensor."""
        squares = [w.float().square().sum(0) for w in weights_of(self.program, entry.linears)]
        return torch.stack(squares).sum(0).sqrt().clamp(min=1e-30)

    def _shifts(self) -> dict[str, float]:
        modes = {entry.name: Mode() for entry in self.chosen}
        self._collect(modes, "modes")
        return {name: mode.value() for name, mode in modes.items()}

    def _collect(self, by_site: Mapping[str, calibration.Collector], what: str) -> None:
        nodes = {self.node[name]: collector for name, collector in by_site.items()}
        if len(nodes) < len(by_site):
            raise UsageError("two groups of linears read the same tensor as different sites")
        name = f"{calibration.numbered(self.program, 'sparsity')}-{what}"
        calibration.collect(self.program, self.context, self.items, nodes, name, self.identity)
