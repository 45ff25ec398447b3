"""REx: the rounding error of the weights is quantized too, and added by the same integer kernel."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from onnxq import layer_nodes
from onnxq.errors import OnnxqError
from onnxq.folding import array_of
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.channel_scales import weight_specs
from onnxq.passes.expand_residuals import FORMS, ExpandResiduals, is_expandable
from onnxq.recipes.static import Static
from onnxq.weights.importance import output_importance
from onnxq.weights.residuals import Residuals, share_out, strongest

TRIED_SAMPLES = 16  # for the importance of layers


@dataclass(frozen=True)
class Rex:
    """Residual expansion of the weights, without data.

    1. Rewrite the graph so that the target's kernels match.
    2. E₀ = W. For k = 1 … K: R_k = round(E_{k−1}) with scales of its own; E_k = E_{k−1} − R_k. Orders from the second
       on keep the output channels with the largest errors.
    3. Every layer computes Σ R_k·x: the orders are further output channels of one convolution or product, and the
       bias counts once.
    4. Insert Q/DQ, calibrate activations, store weights as codes, lint, check: as the static recipe does.

    The weights need no data. The means that biases are corrected with, and the ranges of activations unless those stay
    float with ``--activations float``, come from the calibration inputs, or from inputs made from the model itself.
    Orders cost multiplications: two orders of int4 are 8 bits of weight and twice the products, so where INT8 kernels
    are what runs, one order of int8 is cheaper. It pays with int8 and a sparse second order on sensitive channels, and
    with 2 and 3 bits.

    Source: E. Yvinec, A. Dapogny, M. Cord, K. Bailly, REx: Data-Free Residual Quantization Error Expansion, NeurIPS
    2023 (arXiv 2203.14645).

    Departures:
        - ``allocation="network"`` shares a budget out by the relative error that each channel takes off its layer;
          the paper gives every layer the same part (``layer``).
        - ``allocation="outputs"`` shares the budget of all orders out at once by what each step takes off the error of
          the network's outputs, which is tried layer by layer on random inputs: layers that matter get one order more
          than ``orders``, paid for by those that do not. Nothing is given to depthwise layers beyond that. Since biases
          are corrected this is no better on MobileNetV1 0.25 (24.7 dB, 28.3 with ``network`` at the same size).
        - Depthwise convolutions get one order more (``depthwise_orders=0`` is the paper's): their channels sum over
          so few weights that errors do not average out, and they hold about one weight in fifty.
        - An order that another follows leaves half a step at both ends of its range to it (``clip``; the paper's scales
          come from the extremes): errors fall by 3, 7 and 15 per order at 2, 3 and 4 bits instead of 2, 6 and 14. Two
          orders of int2: ResNet-20 4.9 and 7.8 dB, 76 and 84 %; at 4 bits it is within half a dB either way.
        - In grouped convolutions whole groups are kept or left.
        - Ensembling (orders in several networks whose outputs are summed, which is approximate) is not done: behind
          twenty layers the second network's output is a thousandth of the first's, and the sum no closer to float
          (ResNet-20 at W4: 12.8 dB with and without). ``form="branches"`` gives its independence per layer, exactly.
        - Biases take back the mean shift that rounding causes: on depthwise convolutions that is most of the error
          (MobileNetV1 0.25 with two orders of int4: 12.8 dB without, 28.2 dB with it). ``bias_correction=false`` leaves
          them, and takes seconds.
        - Activations are not expanded. For ``cpu`` each order's part of a sum gets codes of its own, because a
          convolution runs on integers only where it writes them: before a Clip at 6 that is too coarse (MobileNetV1
          0.25: 49 % of 65 %; ``tensorrt`` 64 %). Keep activations in float there.

    Attributes:
        orders: K, how many terms the sum has.
        density: The part of the weights that each order after the first keeps.
        depthwise_orders: How many more orders depthwise convolutions get, whole; they hold few of the weights.
        allocation: ``network``, ``layer`` or ``outputs``: how that part is shared out.
        form: ``channels``, one wider layer, or ``branches``, a layer for each order.
        clip: Whether an order leaves half a step at both ends of its range to the next one, which holds it anyway.
        observer: How a range follows from the statistics of an activation.
        bias_correction: Whether biases take back the mean shift that rounding the weights causes.
    """

    orders: int = 2
    density: float = 1.0
    depthwise_orders: int = 1
    allocation: str = choice("network", "layer", "outputs")
    form: str = choice(*FORMS)
    clip: bool = True
    observer: str = "robust"
    bias_correction: bool = True

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        self._check(job)
        job.prepare()
        specs = weight_specs(job.target.place(job.model.graph, job.scheme, job.settings.left_out, job.exceptions))
        layers: dict[str, Residuals] = {}
        thin: list[str] = []  # depthwise: a channel sums over so few weights that their errors do not average out
        for item in layer_nodes.weighted_nodes(job.model.graph):
            if item.node in specs and is_expandable(item):
                weight = np.moveaxis(array_of(item.weight), item.channel_axis, 0)
                groups = item.node.attributes.get_int("group", 1) if item.node.op_type == "Conv" else 1
                rows = weight.reshape(len(weight), -1).astype(np.float32)
                name = item.node.name or ""
                layers[name] = Residuals(rows, specs[item.node], groups if groups > 1 else len(rows), clip=self.clip)
                if groups > 1 and weight.shape[1] == 1:
                    thin.append(name)
        if self.allocation == "outputs":
            self._share_out(job, layers)
        else:
            for _ in range(self.orders - 1):
                for name, kept in strongest(layers, self.density, self.allocation).items():
                    layers[name].refine(kept)
            for name in thin if self.orders > 1 else ():
                for _ in range(self.depthwise_orders):
                    layers[name].refine(np.arange(len(layers[name].rest)))
        ExpandResiduals({name: layer.orders for name, layer in layers.items()}, self.form)(job.model)
        Static(self.observer, self.bias_correction).quantize(job)

    def _share_out(self, job: Job, layers: dict[str, Residuals]) -> None:
        """Spend the weights of all orders after the first where they take most off the error of the outputs."""
        if self.orders == 1 or not layers:
            return
        tried = copy.deepcopy(layers)
        for layer in tried.values():
            layer.refine(np.arange(len(layer.rest)))  # one order of few bits is too far off to tell layers apart
        rounded = {name: layer.rounded() for name, layer in tried.items()}
        importance = output_importance(job, rounded, min(TRIED_SAMPLES, len(job.source)), self.bias_correction)
        weights = sum(layer.rest.size for layer in layers.values())
        budget = (self.orders - 1) * self.density * weights
        for order in share_out(layers, importance, budget, self.orders):
            for name, kept in order.items():
                layers[name].refine(kept)

    def _check(self, job: Job) -> None:
        weights = job.scheme.weights
        if not weights.enabled or weights.granularity == "tensor" or weights.format.is_float or not weights.symmetric:
            raise OnnxqError(
                f"expected symmetric integer weights with a scale per channel or block for rex, found {weights}",
                hint="use for example --weights int4",
            )
        if self.orders < 1 or not 0 <= self.density <= 1:
            raise OnnxqError(
                f"expected at least one order and a density between 0 and 1, found {self.orders} and {self.density}",
                hint="use for example --set orders=2 --set density=0.5",
            )
