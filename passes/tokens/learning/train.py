"""Learning the counts: the loop, its state, and the schedule that comes out.

DiffRate (Chen et al., ICCV 2023): only the distributions over counts are trained, by the task's loss
plus ``lambda (F - target)^2`` for the cost F.  With F in GMACs the paper takes lambda = 5; here F is a
share of the dense cost so that one number serves every model, and 106 is the paper's 5 on DeiT-S
(4.6 GMACs).  The paper trains 3,750 steps of 1,024 images at a rate of 0.01; on a frozen backbone a
few hundred steps of 32 suffice when the rate is raised so that the logits can travel as far, and when
they set out from even counts that already cost what was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.contract import Dataset
from thresher.compiler.errors import UsageError
from thresher.passes.learning import checkpoint
from thresher.passes.learning.loss import choose
from thresher.passes.tokens.learning import survival
from thresher.passes.tokens.learning.fit import even, fitted
from thresher.passes.tokens.learning.job import Job, Learned
from thresher.passes.tokens.learning.masked import MaskedForward, Policy

WEIGHT = 106.0  # lambda of the cost term, see above
TRAVEL = 20.0  # learning rate x steps: 3,750 steps at a mean rate of 0.0055
SETTLED = 0.005  # share of the dense cost that F may be off when the counts have settled
SAVE_EVERY = 25  # steps between checkpoints
CHECKED = 1024  # items on which what was learned has to beat even counts
UNSEEN = 10_000  # epoch number of their order, which no training reaches


def learn(job: Job) -> Learned:
    """Learn the counts of a Program's sites, at the target's cost.

    What was learned has to beat the even counts that it set out from, on :data:`CHECKED` items in
    another order; else those are returned, with a ``gain`` of 0.

    Raises:
        UsageError: the length is not fixed, there is no data, nothing to learn at, or a checkpoint
            of another run is in the way.
        VerdictError: the target cannot be met.
    """
    data = job.context.data
    if data is None:
        raise UsageError("learning counts needs data: add --data DATA")
    if not isinstance(job.sites.tokens, int):
        raise UsageError(
            "counts are learned for a fixed input length and this model's is dynamic: give --length"
        )
    if not job.layers:
        raise UsageError("there are too few blocks to learn counts for: give counts, keep or r")
    with workers.joined():
        training = _Training(job, data)
        found, start = fitted(training.run(), job), training.start
        gain = training.judged(start) - training.judged(found)
        best = found if gain > 0 else start
        return replace(
            found, prune=best.prune, counts=best.counts, share=best.share, gain=max(0.0, gain)
        )


class _Training:
    """Logits, optimiser and history of one training."""

    def __init__(self, job: Job, data: Dataset) -> None:
        self.job, self.data = job, data
        self.loss_name, self.loss = choose(job.program, data, job.options.loss)
        self.forward = MaskedForward(job.program, job.sites)
        self.choices = survival.candidates(job.patches, job.options.granularity)
        self.start = even(job)
        self.logits = self._untrained().requires_grad_()
        steps = job.options.steps
        rate = TRAVEL / steps
        self.optimizer = torch.optim.AdamW([self.logits], lr=rate, weight_decay=0.0)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, steps, eta_min=rate / 10
        )
        self.step = self.unchanged = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self.history: list[list[float]] = []
        self._resume()
        self.chain = self._chain()

    def run(self) -> Learned:
        """Train until the counts settle or the steps are used up."""
        while self.step < self.job.options.steps and not self._settled():
            try:
                self._advance()
            except KeyboardInterrupt:
                self._save()
                raise
            if self.step % SAVE_EVERY == 0:
                self._save()
        self._save()
        prune, counts, share = self.chain
        return Learned(tuple(prune), tuple(counts), share, self.loss_name, self.step, self.history)

    def judged(self, chain: Learned) -> float:
        """The task's mean loss under whole counts."""
        size, items = self.job.context.batch, len(self.data)
        generator = torch.Generator().manual_seed(self.job.context.seed * 10_007 + UNSEEN)
        order = torch.randperm(items, generator=generator)[:CHECKED].tolist()
        prefix = self.job.sites.protected
        rows = [(chain.prune[i] - prefix, chain.counts[i] - prefix) for i in self.job.layers]
        policies = self._policies(torch.tensor(rows, dtype=torch.float32))
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                inputs, labels = self._items(chosen)
                dense = {} if self.loss_name == "labels" else self._dense(inputs)
                found = self.loss(self.forward.outputs(inputs, policies), dense, labels)
                total += float(found) * len(chosen)
        return total / len(order)

    def _advance(self) -> None:
        inputs, labels = self._batch()
        counts = self._counts()
        policies = self._policies(counts)
        outputs = self.forward.outputs(inputs, policies)
        dense = {} if self.loss_name == "labels" else self._dense(inputs)
        task = self.loss(outputs, dense, labels)
        share = self.job.cost.share(self._behind(counts))
        total = task + WEIGHT * (share - self.job.target) ** 2
        self.optimizer.zero_grad()
        total.backward()
        assert self.logits.grad is not None
        workers.mean(self.logits.grad)
        before = self.chain
        self.optimizer.step()
        self.rates.step()
        self.step += 1
        self.chain = self._chain()
        self.unchanged = self.unchanged + 1 if self.chain == before else 0
        _, tokens, cost = self.chain
        row = [float(task.detach()), cost, *map(float, tokens)]
        self.history.append(row)
        self._tell(row[0], cost, tokens)

    # --- data ---------------------------------------------------------------------------------

    def _batch(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The items of this step and this process; the order follows from seed and step alone."""
        size, items = self.job.context.batch, len(self.data)
        size = min(size, items // workers.count() or 1)
        first = (self.step * workers.count() + workers.rank()) * size
        return self._items([self._shuffled(place) for place in range(first, first + size)])

    def _items(self, chosen: list[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        arrays, labels = self.data.take(chosen)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        known = labels is not None and self.loss_name == "labels"
        return inputs, torch.from_numpy(labels).long() if known else None

    def _shuffled(self, place: int) -> int:
        epoch, index = divmod(place, len(self.data))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.job.context.seed * 10_007 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self._order[index])

    def _dense(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.forward.outputs(inputs, {})

    # --- counts -------------------------------------------------------------------------------

    def _untrained(self) -> Tensor:
        """``[layers, 2, M]``: distributions around even counts."""
        start, prefix = self.start, self.job.sites.protected
        means = [(start.prune[i] - prefix, start.counts[i] - prefix) for i in self.job.layers]
        return survival.flattest(torch.tensor(means, dtype=torch.float64), self.choices)

    def _counts(self) -> Tensor:
        """``[layers, 2]``: unprotected tokens kept by pruning and by merging."""
        counts = survival.kept(self.logits, self.choices)
        if self.job.prunes:
            return counts
        everything = torch.full_like(counts[:, :1], float(self.job.patches))
        return torch.cat([everything, counts[:, 1:]], dim=1)

    def _policies(self, counts: Tensor) -> dict[int, Policy]:
        chance = survival.survival(self.logits, self.choices, self.job.patches)
        masks = survival.mask(chance, counts)
        policies = {}
        for row, index in enumerate(self.job.layers):
            pruned, kept = (int(c) for c in counts[row].detach())
            mask = masks[row, survival.MERGE]
            if self.job.prunes:
                mask = mask * masks[row, survival.PRUNE]
            site = self.job.sites.sites[index]
            policies[site.layer] = Policy(pruned, min(pruned, kept), mask)
        return policies

    def _behind(self, counts: Tensor) -> list[Any]:
        """Tokens behind every site, with gradients."""
        prefix = self.job.sites.protected
        now: Tensor = torch.tensor(float(self.job.tokens))
        behind: list[Any] = []
        rows = iter(counts + prefix)
        for index in range(len(self.job.sites.sites)):
            if index in self.job.layers:
                pruned, kept = next(rows)
                now = survival.smallest(now, pruned, kept)
            behind.append(now)
        return behind

    def _chain(self) -> tuple[list[int], list[int], float]:
        """Whole numbers after pruning and merging behind every site, clamped, and their cost."""
        prefix, now = self.job.sites.protected, self.job.tokens
        prune, counts = [], []
        rows = iter(self._counts().detach())
        for index in range(len(self.job.sites.sites)):
            pruned = now
            if index in self.job.layers:
                wanted = [prefix + int(c) for c in next(rows)]
                pruned = min(now, wanted[0])
                now = min(pruned, wanted[1])
            prune.append(pruned)
            counts.append(now)
        return prune, counts, float(self.job.cost.share(counts))

    def _settled(self) -> bool:
        if self.unchanged < self.job.options.patience:
            return False
        return abs(self.chain[2] - self.job.target) <= SETTLED

    # --- state --------------------------------------------------------------------------------

    def _file(self) -> Path | None:
        folder = self.job.context.checkpoints
        return None if folder is None else folder / "counts.pt"

    def _save(self) -> None:
        path = self._file()
        if path is None or workers.rank() != 0:
            return
        state = {
            "logits": self.logits.detach(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "step": self.step,
            "unchanged": self.unchanged,
            "history": self.history,
        }
        checkpoint.save(path, self.job.fingerprint, state)

    def _resume(self) -> None:
        path = self._file()
        state = None if path is None else checkpoint.load(path, self.job.fingerprint)
        if state is None:
            return
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.step, self.unchanged = state["step"], state["unchanged"]
        self.history = state["history"]

    def _tell(self, task: float, cost: float, counts: Sequence[int]) -> None:
        shown = " ".join(map(str, counts))
        text = f"learning counts: loss {task:.3f}, work {cost:.3f}, tokens {shown}"
        self.job.context.progress(text, self.step, self.job.options.steps)
