"""ZeroQuant: weights in groups of rows, activations token by token, and layers that learn from the float network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.calibration import observers
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.errors import OnnxqError
from onnxq.formats import NumberFormat
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.channel_scales import weight_specs
from onnxq.passes.normalise_tokens import NormaliseTokens
from onnxq.passes.split_gemm_bias import SplitGemmBias

Array = np.ndarray[Any, Any]
STEPS = {"quick": 20, "default": 100, "paper": 100}
RANGES = ("full", "symmetric")


@dataclass(frozen=True)
class ZeroQuant:
    """Fine-grained quantization of transformers, with layer-by-layer distillation.

    1. Rewrite the graph so that the target's kernels match; every product reads x / max|x| of its token, and its
       output is multiplied back.
    2. Insert Q/DQ: one constant scale quantizes each token over its own range. Other layers as in the static recipe.
    3. Weight scales: one for each output channel, or for a group of them.
    4. Layer by layer, learn weights, biases and norms so that the quantized layer gives the float layer's output.
    5. Store weights as codes, lint, check.

    Token-wise codes cost a maximum and a division before a product and a multiplication behind it; TensorRT fuses the
    first two with the quantizer.

    Source: Z. Yao, R. Y. Aminabadi, M. Zhang, X. Wu, C. Li, Y. He, ZeroQuant: Efficient and Affordable Post-Training
    Quantization for Large-Scale Transformers, NeurIPS 2022 (arXiv 2206.01861), sections 4.1 to 4.3; scales of groups
    and their range as in DeepSpeed's code.

    Departures:
        - Scales per output channel by default; the authors' groups of rows (``row_groups=48`` for BERT) are coarser.
          Blocks along the reduction axis are ``--weights int4:64`` with float activations.
        - A distilled layer reads what the quantized layers before it make (``block_inputs=student``); the paper's
          reads the float network's (``teacher``).
        - Distillation is off unless asked for: at 8 bits there is nothing to learn.
        - Embeddings stay in float, and one format serves attention and feed-forward layers alike.
        - The target ``cpu`` has a zero point beside the same division.

    Attributes:
        row_groups: Into how many groups of output channels each weight is cut; 0: one scale for each channel.
        weight_range: ``full``, max|w| / 2^(b−1), whose largest weight is clipped by a step at most, or ``symmetric``.
            At 8 bits ``symmetric`` is as good or better, and ``auto`` takes it there.
        tokenwise: Whether activations are quantized token by token.
        distil: Whether layers learn.
        steps: Steps for each layer; 0: what ``--budget`` says.
        batch: Sequences in a step.
        rate: Of Adam.
        block_inputs: ``student`` or ``teacher``.
        samples: How many samples to learn from, at most.
        cache_mib: Memory for activations; what is more goes to files.
    """

    row_groups: int = 0
    weight_range: str = "auto"
    tokenwise: bool = True
    distil: bool = False
    steps: int = 0
    batch: int = 16
    rate: float = 5e-5
    block_inputs: str = choice("student", "teacher")
    samples: int = 256
    cache_mib: int = 1024

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        if self.weight_range not in (*RANGES, "auto") or self.row_groups < 0:
            raise OnnxqError(
                f"expected weight_range {', '.join(RANGES)} or auto and row_groups of at least 0, found "
                f"{self.weight_range!r} and {self.row_groups}",
                hint="use --set weight_range=auto",
            )
        job.prepare()
        if self.tokenwise and job.scheme.activations.enabled:
            SplitGemmBias()(job.model)
            specs = weight_specs(job.target.place(job.model.graph, job.scheme, job.settings.left_out, job.exceptions))
            NormaliseTokens([node.name or "" for node in specs])(job.model)
        blocks = self._blocks(job)
        # The maximum of a token is 1 on any sample: no other rule may cut it.
        insert_calibrated(job, observers.get("minmax"), self._search())
        if self.distil:
            self._distil(job, blocks)
        job.lower()

    def _search(self) -> Callable[[Array, NumberFormat, bool], tuple[Array, Array]]:
        def search(rows: Array, number_format: NumberFormat, symmetric: bool) -> tuple[Array, Array]:
            largest = np.abs(rows).max(axis=1).astype(np.float64)
            if self.row_groups:
                parts = np.array_split(largest, min(self.row_groups, len(largest)))
                largest = np.concatenate([np.full(len(part), part.max()) for part in parts])
            full = self.weight_range == "full" or (self.weight_range == "auto" and number_format.bits < 8)
            if full and symmetric and not number_format.is_float:
                largest = largest * number_format.high / -number_format.low
            return -largest, largest

        return search

    def _blocks(self, job: Job) -> list[Any]:
        if not self.distil:
            return []
        from onnxq.autograd.blocks import cut

        return cut(job.model.graph)

    def _distil(self, job: Job, blocks: list[Any]) -> None:
        from onnxq.learning.distillation import distil_blocks
        from onnxq.learning.finetune import FineTuning

        steps = self.steps or STEPS[job.settings.budget]
        samples = min(self.samples, len(job.source), job.settings.samples or self.samples)
        options = FineTuning(steps, self.batch, "adam", self.rate, 0.0)
        distil_blocks(job, blocks, options, inputs=self.block_inputs, samples=samples, cache_mib=self.cache_mib)
