"""MultiQuant: one stored model from which every width is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.weights.masters import attach_tables

if TYPE_CHECKING:
    from onnxq.autograd.blocks import Block

# Steps of the optimiser: over the whole network, or for each block.
STEPS = {
    "network": {"quick": 100, "default": 500, "paper": 10000},
    "blocks": {"quick": 50, "default": 200, "paper": 2000},
}


@dataclass(frozen=True)
class MultiQuant:
    """An int8 model that carries, for each weight, the scales of all widths from 2 to 8 bits.

    1. Quantize to int8, as the static recipe does.
    2. For every width and output channel, start at the scale that leaves the least error against the int8 master.
    3. ``train``: in each step, run the network at 8 bits, at a random width for each layer, and at 2 bits. The first
       learns to give the float network's outputs; the others those and, as soft labels, what the first gave. Weights,
       biases and the scales of all widths learn from the sum.
    4. Store the tables beside the codes. ``onnxq export MODEL --bits 4`` writes the model of a width.

    The file is that of int8 and seven numbers for each channel. As it stands it runs at 8 bits. ResNet-20, 256 samples
    and 100 steps for each block, top-1 at 2, 3, 4 and 8 bits: 22, 83, 91 and 91 % (10, 67, 92 and 92 % untrained); as
    the paper adds the losses up (``balance=0``), 42, 85, 89 and 89 %.

    Source: K. Xu, Q. Feng, X. Zhang, D. Wang, MultiQuant: Training Once for Multi-bit Quantization of Neural Networks,
    IJCAI 2022 (doi 10.24963/ijcai.2022/504). The label generation's formula was not at hand: EQ-Net's (the first
    author's successor, ICCV 2023) takes the place.

    Departures:
        - A few hundred samples without labels, given or made, and the float network's outputs in the place of labels.
        - The narrow widths are rounded from the int8 weights, from which they are exported, not from float ones.
        - Only weights change their width; activations keep their 8 bits, and one range serves all widths.
        - BatchNormalization is folded, so that it is not estimated again for each width.
        - First and last layers change their width like all others; the search for a mixture is the recipe ``mixed``.

    Attributes:
        train: Whether weights and scales learn. Clipped rounding does from 4 or 5 bits on.
        distil: ``blocks`` or ``network``: what learns at once.
        steps: Steps of the optimiser (for each block with ``blocks``); 0: what ``--budget`` says.
        batch: Samples in a step.
        weight_rate: Of weights and biases, with Adam.
        step_rate: Of the logarithms of steps.
        own_labels: The part of the narrow widths' loss that looks at the 8-bit outputs.
        balance: From 0, the paper's sum, to 1, where each width's loss counts relative to its own size: narrow widths
            gain less, and 8 bits keep what they have.
        loss: ``auto``, ``kl`` or ``mse``.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for samples and the float network's outputs; what is more goes to files.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding to 8 bits causes, before training.
        weight_ranges: How the master's range follows from the weights: ``minmax`` or ``mse``.
    """

    train: bool = True
    distil: str = choice("blocks", "network")
    steps: int = 0
    batch: int = 32
    weight_rate: float = 3e-4
    step_rate: float = 1e-2
    own_labels: float = 0.5
    balance: float = 0.5
    loss: str = choice("auto", "kl", "mse")
    samples: int = 1024
    cache_mib: int = 1024
    observer: str = "robust"
    bias_correction: bool = True
    weight_ranges: str = "minmax"

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        weights = job.scheme.weights
        if weights.format.name != "int8" or weights.granularity == "block":
            raise OnnxqError(
                f"expected int8 weights per channel as the master of all widths, found {weights}",
                hint="leave --weights out; `onnxq export --bits` picks the width",
            )
        if not 0 <= self.own_labels <= 1:
            raise OnnxqError(
                f"expected own_labels between 0 and 1, found {self.own_labels}", hint="use --set own_labels=0.5"
            )
        observer, search = observers.get(self.observer), weight_ranges.get(self.weight_ranges)
        job.prepare()
        blocks, outputs = self._wanted(job)
        calibrated = insert_calibrated(
            job, observer, search, corrects_biases=self.bias_correction, is_teacher=self.train
        )
        tables = self._train(job, blocks, outputs, calibrated.biases) if self.train else {}
        job.lower()
        attach_tables(job.model, tables)

    def _wanted(self, job: Job) -> tuple[list[Block], dict[str, str]]:
        """The blocks that learn, and the outputs that are compared where the network learns as a whole."""
        if not self.train:
            return [], {}
        from onnxq.autograd.blocks import cut
        from onnxq.learning.losses import compared_outputs

        return cut(job.model.graph) if self.distil == "blocks" else [], compared_outputs(job.model, self.loss)

    def _train(self, job: Job, blocks: list[Block], outputs: dict[str, str], biases: dict[str, Any]) -> dict[str, Any]:
        from onnxq.learning.finetune import FineTuning
        from onnxq.learning.multi_width import train_widths

        steps = self.steps or STEPS[self.distil][job.settings.budget]
        return train_widths(
            job,
            blocks,
            outputs,
            FineTuning(steps, self.batch, "adam", self.weight_rate, self.step_rate),
            own=self.own_labels,
            balance=self.balance,
            samples=min(self.samples, len(job.source), job.settings.samples or self.samples),
            cache_mib=self.cache_mib,
            biases=biases,
        )
