"""The pass: class tokens of several blocks are read out together; what blocks held is appended where tokens left."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Calibration, Context, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.program import Program, Refusal
from thresher.passes.learning import saved
from thresher.passes.learning.schedule import thinned
from thresher.passes.tokens.clca.place import Place, find_place
from thresher.passes.tokens.clca.train import ClcaOptions, Trained, train


class Clca(Pass[ClcaOptions]):
    """What a token reduction lost is brought back by a cache and a head.

    Rios et al., "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image
    Recognition", ICASSP 2025.  A learned token is appended to the sequence.  Behind each block the mean of
    the tokens and the last token are kept, and behind blocks at which tokens leave, and behind the last block but one,
    what was kept is appended.  The head takes the place of the model's own: class tokens behind each block at
    which tokens leave and behind the last, mixed channel by channel.  The model is frozen; head and token
    are trained on the model before its reduction.
    """

    name = "clca"
    summary = "bring back what a token reduction lost: a cache across blocks, a head over several class tokens (CLCA)"
    Options = ClcaOptions
    requires = frozenset({"tokens-reduced"})
    needs_data: ClassVar[bool] = True
    trains = True

    def match(self, program: Program, context: Context) -> PassResult:
        """Whether the model has a place for cache and head; no training."""
        place = self._place(program)
        if isinstance(place, Refusal):
            return PassResult(program, 1, 0, (place,))
        return PassResult(program, 1, 1, details=_details(place, place.inserted))

    def run(self, program: Program, context: Context) -> PassResult:
        place = self._place(program)
        if isinstance(place, Refusal):
            return PassResult(program, 1, 0, (place,))
        digest = weights_digest(program)
        found = self._found(place, context, digest)
        result = place.filled(found.weights)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        tensors = {f"{name}.{self.name}": tensor for name, tensor in found.weights.items()}
        details = _details(place, result) | {"note": self._note(found, context)}
        if found.history:
            details["training"] = {
                "loss": found.loss, "steps": len(found.history), "history": thinned(found.history),
            }  # fmt: skip
        return PassResult(
            result, 1, 1, (), details, self.options.model_copy(update={"calibration": Path(file)}),
            Calibration(file, digest, tensors, place.facts),
        )  # fmt: skip

    def _place(self, program: Program) -> Place | Refusal:
        if any(record.name == self.name and record.applied for record in program.history):
            return Refusal("(graph)", "this model has a cache and a head of that kind already")
        return find_place(program, self.name, cache=self.options.cache)

    def _found(self, place: Place, context: Context, digest: str) -> Trained:
        path = self.options.calibration
        if path is None:
            return train(place, self.options, context)
        found = saved.read(path, digest, self.name, [self.name], place.facts)
        return Trained({name: found[f"{name}.{self.name}"] for name in place.stored})

    def _note(self, found: Trained, context: Context) -> str:
        if self.options.calibration is not None:
            return f"head taken from {self.options.calibration.name}"
        assert context.data is not None
        judge = "its labels and the" if found.loss == "labels" else "the"
        return (
            f"a head trained on {context.data.name} by {judge} outputs of the model before its reduction, in"
            f" {len(found.history)} steps, all other weights frozen"
        )


def _details(place: Place, result: Program) -> dict[str, Any]:
    """What is appended where, and the cost of one item before and behind the pass."""
    came, macs = total_macs(place.program.graph), total_macs(result.graph)
    return {
        "appended": dict(place.appended),
        "blocks_read": place.anatomy.read,
        "dense_macs": came,
        "macs": macs,
        "ideal": came / macs,
    }
