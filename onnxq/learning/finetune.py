"""Fine-tuning of a quantized network after its float self: straight-through weights, learned steps, any source of data.

One loop serves end-to-end distillation on calibration samples, layer-by-layer distillation (each block is a student
of its own), generators that make the batch while they learn themselves, and denoisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from onnxq.errors import OnnxqError
from onnxq.learning.checkpoint import Checkpoint
from onnxq.learning.losses import Loss
from onnxq.learning.student import Student

Array = np.ndarray[Any, Any]
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class FineTuning:
    """How a student learns.

    Attributes:
        steps: Steps of the optimiser.
        batch: Samples in a step, where calibration samples are the source.
        optimizer: ``adam``, or ``sgd`` with Nesterov momentum.
        weight_rate: Rate of weights, biases and factors of normalisations.
        step_rate: Rate of the logarithms of steps, and of zero points in parts of the range of codes.
        momentum: Of SGD.
        weight_decay: Of weights; steps have none.
        milestones: Parts of the run after which rates fall by ten; ``()``: half a cosine down to 0.
        save_every: Steps between two checkpoints.
    """

    steps: int = 1000
    batch: int = 32
    optimizer: str = "adam"
    weight_rate: float = 1e-5
    step_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    save_every: int = 200

    def rate_factor(self, step: int) -> float:
        """What rates are multiplied by at a step, counted from 0."""
        progress = step / self.steps
        if self.milestones:
            return float(0.1 ** sum(progress >= milestone for milestone in self.milestones))
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Batch:
    """What a student sees in one step.

    Attributes:
        inputs: Values to run both networks on, by name.
        teacher: The float network's values for them, where they are known; others are computed.
    """

    inputs: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor] = field(default_factory=dict)


Batches = Callable[[int], Batch]
"""From the number of a step to its batch; the same number gives the same batch, so that a run can be resumed."""


@dataclass(frozen=True)
class Moment:
    """What further terms of a loss may look at.

    Attributes:
        step: The number of the step.
        inputs: The batch.
        student: The quantized network's values, with gradients.
        teacher: The float network's values.
    """

    step: int
    inputs: Mapping[str, Tensor]
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]


Term = Callable[[Moment], Tensor]


class Companion(Protocol):
    """What learns beside the student and has to be resumed with it: a generator, for example."""

    def state(self) -> dict[str, Array]:
        """Arrays by name."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take up what :meth:`state` gave."""


def finetune(
    student: Student,
    batches: Batches,
    wanted: Sequence[str],
    loss: Loss,
    options: FineTuning,
    *,
    terms: Sequence[Term] = (),
    companions: Sequence[Companion] = (),
    checkpoint: Checkpoint | None = None,
    name: str = "finetune",
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Train the student until it gives what its teacher gives.

    Args:
        student: What learns; changed in place. The graph's initializers are not: ``quantizers.store`` does that.
        batches: Where inputs come from: samples, or a generator that learns as it is asked.
        wanted: Names of the values that the loss and its terms read.
        loss: Of the student's and the teacher's values.
        options: How.
        terms: Further terms that are added to the loss.
        companions: What learns beside it.
        checkpoint: Where to keep unfinished work; ``None`` keeps nothing.
        name: Of this stage within the checkpoint.
        on_step: Called with the number of steps done, before they are kept: companions may change there.

    Returns:
        The new initializers by name.

    Raises:
        OnnxqError: the optimiser is unknown, nothing learns, or the loss is no longer finite.
    """
    optimizer = _optimizer(student, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    start = _resume(student, optimizer, companions, checkpoint, name)
    for step in range(start, options.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * options.rate_factor(step)
        batch = batches(step)
        device = student.graph.device
        inputs = {key: value.to(device) for key, value in batch.inputs.items()}
        teacher = {key: value.to(device) for key, value in batch.teacher.items()}
        unknown = [key for key in wanted if key not in teacher]
        if unknown:
            with torch.no_grad():
                teacher |= student.teach(inputs, unknown)
        found = student.run(inputs, wanted)
        total = loss(found, teacher)
        for term in terms:
            total = total + term(Moment(step, inputs, found, teacher))
        if not torch.isfinite(total):
            raise OnnxqError(
                f"expected a finite loss while fine-tuning, found {float(total.detach())} at step {step}",
                hint="lower the rates, for example --set weight_rate=1e-6 --set step_rate=1e-4",
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1)
        if checkpoint is not None and (step + 1) % options.save_every == 0:
            checkpoint.save(name, _state(step + 1, optimizer, companions))
    return student.learned()


def _optimizer(student: Student, options: FineTuning) -> torch.optim.Optimizer:
    if options.optimizer not in OPTIMIZERS:
        raise OnnxqError(
            f"expected an optimizer of {', '.join(OPTIMIZERS)}, found {options.optimizer!r}",
            hint="use --set optimizer=adam",
        )
    power = 2 if options.optimizer == "sgd" else 1  # of SGD, gradients grow with what a weight multiplies, too
    by_rate: dict[float, list[Tensor]] = {}
    for name, master in student.masters.items():
        if master.requires_grad:
            rate = options.weight_rate / student.input_sizes.get(name, 1.0) ** power
            by_rate.setdefault(rate, []).append(master)
    groups: list[dict[str, Any]] = [
        *({"params": found, "lr": rate, "weight_decay": options.weight_decay} for rate, found in by_rate.items()),
        {"params": student.steps(), "lr": options.step_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise OnnxqError(
            "expected weights or steps that learn, found neither",
            hint="raise weight_rate or step_rate, or use --recipe default",
        )
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=options.momentum, nesterov=options.momentum > 0)
    return torch.optim.Adam(groups)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(step: int, optimizer: torch.optim.Optimizer, companions: Sequence[Companion]) -> dict[str, Array]:
    arrays: dict[str, Array] = {"step": np.asarray(step)}
    for index, parameter in enumerate(_parameters(optimizer)):
        arrays[f"parameter/{index}"] = parameter.detach().cpu().numpy()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                arrays[f"optimizer/{index}/{key}"] = value.detach().cpu().numpy()
    for index, companion in enumerate(companions):
        arrays |= {f"companion/{index}/{key}": array for key, array in companion.state().items()}
    return arrays


def _resume(
    student: Student,
    optimizer: torch.optim.Optimizer,
    companions: Sequence[Companion],
    checkpoint: Checkpoint | None,
    name: str,
) -> int:
    """Take up the last checkpoint; the number of steps that it has behind it."""
    arrays = None if checkpoint is None else checkpoint.load(name)
    if arrays is None:
        return 0
    for index, parameter in enumerate(_parameters(optimizer)):
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(arrays[f"parameter/{index}"]))
        prefix = f"optimizer/{index}/"
        kept = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        for key, array in kept.items():  # Adam counts its steps on the CPU
            tensor = torch.from_numpy(array)
            optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
    for index, companion in enumerate(companions):
        prefix = f"companion/{index}/"
        companion.restore({key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)})
    return int(arrays["step"])
