"""Training of the feed-forward weights of a changed Program to give what the dense one gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

import thresher.kernels.ops  # noqa: F401  (registers the operators that the graph may call)
from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN, find
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.linears import stored_values, stored_weights
from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.identity import identity
from thresher.passes.learning.loss import choose, unpadded
from thresher.passes.learning.tap import real_rows
from thresher.passes.learning.training import Keeping, Phase, Step, Training
from thresher.passes.tokens.sizes import visible

STEEPEST = 1.0  # norm to which gradients are cut


class Schedule(Protocol):
    """How long and by what is trained."""

    steps: int
    rate: float
    loss: Any
    patience: int

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Finetuned:
    """What came out.

    Attributes:
        exported: the changed graph with trained weights.
        zeros, zeros_swapped: share of exact zeros among the hidden values of each network on
            held-out data, with the trained weights and with those that came in.
        loss: name of the task's loss.
        history: rows of the task's loss and the networks' error, one per step.
    """

    exported: ExportedProgram
    zeros: tuple[float, ...]
    zeros_swapped: tuple[float, ...]
    loss: str
    history: list[list[float]]


def finetune(
    dense: Program,
    changed: Program,
    paths: Sequence[str],
    schedule: Schedule,
    context: Context,
    made_by: str,
) -> Finetuned:
    """Train the weights of the networks at ``paths``, which ``changed`` and ``dense`` both have.

    What is minimised is the task's loss plus the mean over networks of
    ``|y - y_dense|^2 / |y_dense|^2``, y a network's output in its own model.  Padding counts in neither.
    Checkpoints are called after the pass, ``made_by``.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """
    with workers.joined():
        return _Training(dense, changed, paths, schedule, context, made_by).run()


class _Training:
    """Weights and their training."""

    def __init__(
        self,
        dense: Program,
        changed: Program,
        paths: Sequence[str],
        schedule: Schedule,
        context: Context,
        made_by: str,
    ) -> None:
        data = context.data
        assert data is not None
        self.dense, self.changed = dense, changed
        self.schedule, self.context, self.paths = schedule, context, paths
        self.made_by = made_by
        self.loss_name, self.loss = choose(dense, data, schedule.loss)
        self.batches = Batches(data, context.batch, context.seed, labels=self.loss_name == "labels")
        ffns = {ffn.path: ffn for ffn in find(changed).ffns}
        teachers = {ffn.path: ffn for ffn in find(dense).ffns}
        self.ffns = [ffns[path] for path in paths]
        self.weights = _trainable(changed, self.ffns)
        self.student = _Watched(changed, [f.down for f in self.ffns])
        self.teacher = _Watched(dense, [teachers[path].down for path in paths])
        text = "training: loss {:.4f}, networks' error {:.4f}"
        phase = Phase(text, schedule.steps, (schedule.rate,), self._loss)
        keeping = Keeping(context, made_by, self._fingerprint)
        self.training = Training(
            [self.weights], [phase], keeping, schedule.patience, rest_by=sum, steepest=STEEPEST
        )

    def run(self) -> Finetuned:
        """All steps, or as many as bring something."""
        self.training.run()
        (history,) = self.training.history
        before = self._zeros({})
        trained = {name: weight.detach() for name, weight in self.weights.items()}
        after = self._zeros(trained) if history else before
        exported = _with_weights(self.changed, trained, self.made_by)
        return Finetuned(exported, after, before, self.loss_name, history)

    def _loss(self, step: int) -> Step:
        inputs, labels = self.batches.at(step)
        with torch.no_grad():
            wanted, seen = self.teacher.outputs(inputs, {})
        found, made = self.student.outputs(inputs, self.weights)
        alive = self.teacher.alive
        task = self.loss(unpadded(found, alive), unpadded(wanted, alive), labels)
        errors = torch.stack(
            [
                _error(real_rows(y, alive), real_rows(target, alive))
                for y, target in zip(made, seen, strict=True)
            ]
        )
        return task + errors.mean(), [float(task.detach()), float(errors.detach().mean())]

    def _zeros(self, weights: Mapping[str, Tensor]) -> tuple[float, ...]:
        """Share of exact zeros of each network's hidden values where there is no padding."""
        watched = _Watched(self.changed, [ffn.hidden for ffn in self.ffns])
        zeros, total = torch.zeros(2, len(self.ffns), dtype=torch.float64)
        for inputs, _ in self.batches.held_out():
            with torch.no_grad():
                _, hidden = watched.outputs(inputs, weights)
            rows = [real_rows(h, watched.alive) for h in hidden]
            zeros += torch.stack([(h == 0).double().sum() for h in rows])
            total += torch.tensor([h.numel() for h in rows])
        return tuple((zeros / total).tolist())

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {
            **identity(self.changed, self.context),
            "networks": list(self.paths),
            **self.schedule.model_dump(mode="json"),
        }


class _Watched(fx.Interpreter):
    """Runs a Program, with other weights if given, and remembers the values of some nodes."""

    def __init__(self, program: Program, nodes: Sequence[fx.Node]) -> None:
        super().__init__(program.exported.graph_module)
        self.program, self.nodes = program, nodes
        self._names = stored_weights(program)
        self._padding = find_sites(program).padding
        self.alive: Tensor | None = None  # [B, N] of the last run: which tokens are no padding
        self._seen: dict[fx.Node, Tensor] = {}

    def outputs(
        self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Outputs by name, and the values of the nodes."""
        places = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        given = self.program.placeholder_values(inputs)
        values = [
            weights.get(self._names.get(place, ""), value)
            for place, value in zip(places, given, strict=True)
        ]
        results: Sequence[Tensor] = self.run(*values)
        names = (spec.name for spec in self.program.outputs)
        return dict(zip(names, results, strict=True)), [self._seen.pop(n) for n in self.nodes]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self._seen[n] = value
        if n is self._padding:
            self.alive = visible(value) > 0
        return value


def _error(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / target.square().sum().clamp(min=1e-12)


def _trainable(program: Program, ffns: Sequence[FFN]) -> dict[str, Tensor]:
    """Copies of the weights and biases of networks, by stored name, with gradients."""
    names, stored = stored_weights(program), stored_values(program)
    return {
        names[place]: stored[place].clone().requires_grad_()
        for ffn in ffns
        for place in ffn.weights
        if place in names
    }


def _with_weights(program: Program, weights: Mapping[str, Tensor], made_by: str) -> ExportedProgram:
    """The same graph with other weights behind its placeholders."""
    rewriter, stored = Rewriter(program, made_by), program.exported.state_dict
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    kept = {
        name: torch.nn.Parameter(weight, False) if name in stored else weight
        for name, weight in weights.items()
    }
    return rewriter.finish([rewriter.map[n] for n in program.output_nodes()], weights=kept)
