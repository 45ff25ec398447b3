"""Which steps of the sampler share a scale, learned from the error of the prediction.

Source: C. Wang, Z. Wang, X. Xu, Y. Tang, J. Zhou, J. Lu, Towards Accurate Post-training Quantization for Diffusion
Models (APQ-DM), CVPR 2024 (arXiv 2305.18723).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.interpreter import Replacement, TorchGraph
from onnxq.calibration.data import STEP_KEY, Array, batches, inputs_of
from onnxq.diffusion.selection import ActiveSelection
from onnxq.job import Job
from onnxq.learning.quantizers import Quantizer, as_float, find, read, round_through

DECISION = 100.0  # by how much the weight of entropy grows
HELD_OUT = 4  # every fourth sample of a step judges what the others taught


@dataclass(frozen=True)
class GroupSearch:
    """How groups are learned.

    Attributes:
        iterations: Steps of the optimiser; each sees samples of one step of the sampler.
        batch: Samples in it.
        choice_rate: Adam's rate of the logits that choose a group.
        scale_rate: Adam's rate of the logarithms of scales.
        sharpness: Logit of the group that a step starts in; the others have 0.
        undecided: Weight λ of the entropy of choices at first; 0.8 in the paper, throughout.
        bonus: Of steps that were seen less (see :class:`ActiveSelection`).
        samples: How many samples are kept in memory, at most.
    """

    iterations: int
    batch: int = 8
    choice_rate: float = 0.2
    scale_rate: float = 0.002
    sharpness: float = 3.0
    undecided: float = 0.8
    bonus: float = 1.5
    samples: int = 512


class GroupedQuantizer:
    """A quantizer that mixes G of its kind: x̂ = Σ σ_g q_g(x), with σ = softmax over the groups at this step.

    Args:
        quantizer: Whose place it takes.
        zero_point: Of all groups.
        scales: Where the groups start [groups].
        groups: In which of them each step starts [steps].
        sharpness: Logit of that group.
        device: Where it learns.
    """

    def __init__(
        self, quantizer: Quantizer, zero_point: float, scales: Array, groups: Array, sharpness: float, device: str
    ) -> None:
        self.quantizer, self.zero_point = quantizer, zero_point
        self.log_scales = torch.tensor(np.log(scales), dtype=torch.float32, device=device, requires_grad=True)
        start = sharpness * np.eye(len(scales), dtype=np.float32)[groups]
        self.logits = [torch.tensor(row, device=device, requires_grad=True) for row in start]
        self.step = 0
        self.hard = False

    def choice(self, step: int) -> Tensor:
        """σ at a step [groups]."""
        return torch.softmax(self.logits[step], 0)

    def entropy(self, step: int) -> Tensor:
        """Of the choice at a step, between 0 and 1."""
        chances = self.choice(step)
        if len(chances) == 1:
            return chances.sum() * 0
        return -(chances * chances.clamp_min(1e-12).log()).sum() / float(np.log(len(chances)))

    def __call__(self, value: Tensor) -> Tensor:
        """The mixture, or at last the one chosen quantizer."""
        chances, scales = self.choice(self.step), self.log_scales.exp()
        if self.hard:
            return self._rounded(value, scales[int(chances.argmax())])
        total = torch.zeros_like(value)
        for chance, scale in zip(chances, scales, strict=True):
            total = total + chance * self._rounded(value, scale)
        return total

    def _rounded(self, value: Tensor, scale: Tensor) -> Tensor:
        low, high = self.quantizer.low - self.zero_point, self.quantizer.high - self.zero_point
        return round_through(value / scale).clamp(low, high) * scale

    def table(self) -> Array:
        """The scale of the chosen group, by step [steps]."""
        scales = self.log_scales.detach().exp().cpu().numpy().astype(np.float64)
        return scales[[int(logits.argmax()) for logits in self.logits]]


@dataclass(frozen=True)
class FoundGroups:
    """What the search found.

    Attributes:
        tables: Scales [steps] by the name of the scale that they replace: those learned, or those it started from.
        kept: Whether what was learned is better on samples that it was not learned from.
        first: Error of the prediction on those, as part of its power, with the groups it started from.
        relaxed: With mixtures, behind the search.
        learned: With the group of the highest chance instead.
        decided: Part of choices whose highest chance is above 0.9.
        visits: How often each step was picked.
    """

    tables: dict[str, Array]
    kept: bool
    first: float
    relaxed: float
    learned: float
    decided: float
    visits: list[int]


def learn_groups(
    job: Job, tables: Mapping[str, Array], groups: Mapping[str, Array], search: GroupSearch, steps: int
) -> FoundGroups:
    """Learn scales and the choice of a group together, end to end, on steps that are picked where choices are open.

    Args:
        job: Behind calibration, with weight scales.
        tables: Scales [steps] to start from, by the name of the scale that they replace.
        groups: The group of each step [steps], by the same name.
        search: How.
        steps: Of the sampler.
    """
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = find(job.model.graph)
    grouped: dict[str, GroupedQuantizer] = {}
    replaced: dict[str, Replacement] = {}
    for item in quantizers:
        if item.scale in tables:
            table, members = tables[item.scale], np.unique(groups[item.scale], return_inverse=True)[1].reshape(-1)
            scales = np.asarray([table[members == group][0] for group in range(members.max() + 1)])
            zero_point = float(read(graph, item.zero_point))
            new = GroupedQuantizer(item, zero_point, scales, members, search.sharpness, job.settings.device)
            grouped[item.scale] = new
            replaced[item.output] = Replacement((item.source,), new)
    exact = as_float(quantizers)
    whole = {spec.name for spec in job.specs if spec.is_whole}
    taught, judged = _by_step(job, search.samples, whole)
    wanted = graph.output_names[:1]

    def error(feed: Mapping[str, Array], step: int) -> Tensor:
        given = {name: torch.from_numpy(np.array(array)).to(graph.device) for name, array in feed.items()}
        with torch.no_grad():
            target = graph.run(given, wanted, replaced=exact)[wanted[0]]
        for item in grouped.values():
            item.step = step
        found = graph.run(given, wanted, replaced=replaced)[wanted[0]]
        return (found - target).square().mean() / target.square().mean().clamp_min(1e-12)

    def judge(*, hard: bool) -> float:
        for item in grouped.values():
            item.hard = hard
        with torch.no_grad():
            errors = [float(error(_stacked(rows[: search.batch], whole), step)) for step, rows in judged.items()]
        for item in grouped.values():
            item.hard = False
        return float(np.mean(errors))

    first = judge(hard=True)
    parameters = [item.log_scales for item in grouped.values()]
    logits = [row for item in grouped.values() for row in item.logits]
    optimizer = torch.optim.Adam(
        [{"params": parameters, "lr": search.scale_rate}, {"params": logits, "lr": search.choice_rate}]
    )
    active = ActiveSelection(np.asarray([step in taught for step in range(steps)]), search.bonus)
    entropies = np.asarray([_entropy(grouped, step).item() for step in range(steps)])
    generator = np.random.default_rng([job.settings.seed, 7])
    with job.progress.stage("groups", "Learning groups of steps", search.iterations) as advance:
        for iteration in range(search.iterations):
            step = active.pick(entropies)
            rows = taught[step]
            picked = generator.permutation(len(rows))[: search.batch]
            loss = error(_stacked([rows[index] for index in picked], whole), step)
            # The error is a small part of the signal; λ weighs entropy against the error that there was at first.
            # It grows, because a mixture is finer than any of its quantizers: the error alone would leave all open.
            weight = search.undecided * DECISION ** (iteration / search.iterations)
            total = loss / max(first, 1e-12) + weight * _entropy(grouped, step)
            optimizer.zero_grad(set_to_none=True)  # choices of other steps keep their moments
            torch.autograd.backward(total)
            optimizer.step()
            entropies[step] = _entropy(grouped, step).item()
            advance(iteration + 1)
    relaxed, learned = judge(hard=False), judge(hard=True)
    chances = [item.choice(step).max().item() for item in grouped.values() for step in judged]
    found = {name: item.table() for name, item in grouped.items()}
    return FoundGroups(
        found if learned < first else dict(tables),
        learned < first,
        first,
        relaxed,
        learned,
        float(np.mean(np.asarray(chances) > 0.9)) if chances else 1.0,
        active.visits.tolist(),
    )


def _entropy(grouped: Mapping[str, GroupedQuantizer], step: int) -> Tensor:
    return torch.stack([item.entropy(step) for item in grouped.values()]).mean()


def _by_step(
    job: Job, samples: int, whole: set[str]
) -> tuple[dict[int, list[dict[str, Array]]], dict[int, list[dict[str, Array]]]]:
    """Samples to learn from and samples to judge on, by step."""
    taught: dict[int, list[dict[str, Array]]] = {}
    judged: dict[int, list[dict[str, Array]]] = {}
    for batch in batches(job.source, job.specs, batch_size=1, samples=min(samples, len(job.source))):
        feed = inputs_of(batch, job.specs)
        for row, step in enumerate(np.atleast_1d(batch[STEP_KEY]).tolist()):  # an export may be fixed to several rows
            seen = len(taught.get(step, [])) + len(judged.get(step, []))
            sample = {name: array if name in whole else array[row : row + 1] for name, array in feed.items()}
            (judged if seen % HELD_OUT == HELD_OUT - 1 else taught).setdefault(step, []).append(sample)
    return taught, judged or taught


def _stacked(rows: list[dict[str, Array]], whole: set[str]) -> dict[str, Array]:
    """Rows of one step as a batch; what has no batch axis is the same for all of them."""
    return {
        name: array if name in whole else np.concatenate([row[name] for row in rows]) for name, array in rows[0].items()
    }
