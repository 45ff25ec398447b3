"""Channels of activations that are far larger than the others, taken into the weights before both are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import kinds, layer_nodes
from onnxq.calibration.channels import ChannelStatistics, record_channels
from onnxq.calibration.data import shows_channels
from onnxq.calibration.random_tokens import RandomTokens, vocabulary_size
from onnxq.calibration.text import roles_of
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.learning.channel_scales import TINY, expected_error, migration, output_errors, weight_maxima, weight_specs
from onnxq.passes.level_gates import LevelGates, gates
from onnxq.passes.normalise_tokens import NormaliseTokens, is_tokenwise
from onnxq.passes.smooth_activations import Group, SmoothActivations, groups, is_foldable
from onnxq.passes.split_gemm_bias import SplitGemmBias
from onnxq.scheme import Spec

Array = np.ndarray[Any, Any]

TEXT_SAMPLES = 32
LEVELLING_SAMPLES = 64  # of fewer, the extremes of channels fall short (PP-OCRv2: 21 dB with 16, 27 with 64)
LEVELLING_ALPHAS = (0.5, 0.75, 1.0)
WORTH_A_GATE = 4.0  # for a Mul more
GATE_LOW = -3.0  # below it HardSwish is zero, and SiLU nearly
LARGEST_CODE = 255
EIGHT_BITS = 8
SILENT = 1e-4  # of the largest channel
WORTH_WHEN_UNSURE = 4.0  # where extremes of channels are hardly known, or weights coarse
WORTH_FOLDING = 1.25  # times less error of the layers that read the value; it costs no node
# Where every channel is mixed with all others, large ones leave rare large values, which range rules cut anyway: at
# promises of 2 and 4.9 times less error ResNet-20 loses 1.7 dB and SqueezeNet 2.
WORTH_AMONG_DENSE = 5.0
RARE_TOKENS = 2048
JUDGED_ROWS = 256
SMALLEST_POWER = 1e-9  # of the largest; a row of zeros has none
GOOD_SHARE = 2e-4  # of the outputs' power: what eight bits leave where nothing sticks out, 37 dB
WORTH_A_NODE = 2.0  # times less error of the layers that read the value


def smooth(job: Job, alpha: float) -> None:
    """Smooth what single channels stick out of; models whose activations do not become integers stay as they are.

    Args:
        job: The job, its graph prepared and without Q/DQ.
        alpha: How much of the difficulty goes to the weights of a model that reads text (see :func:`migration`);
            others are told by what each group of layers needs.
    """
    if _becomes_integers(job) and kinds.kind_of(job.model) is kinds.Kind.LANGUAGE:
        _smooth_text_model(job, alpha)
    else:
        level(job)


def _becomes_integers(job: Job) -> bool:
    activations = job.scheme.activations
    return activations.enabled and not activations.format.is_float


def level(job: Job) -> None:
    """Level the channels of the values that layers read, where their outputs gain by it and no node is needed.

    Not in models that read text, whose outliers ask for more, nor in denoisers, whose channels differ from step to
    step. Where both weights and activations are narrow, levelled weights lose what activations gain.

    Networks for phones are made of convolutions that read one channel each. Between them a single channel may be a
    hundred times the others (PaddleOCR's readers of text: 1.8 dB and not a line right become 20 dB), and whatever it is
    divided by goes into weights that have a scale for each channel anyway. Random inputs and those of ``psaq-vit`` do
    not show which channels those are: what seems small in them would overflow on real ones. Inputs that match the
    statistics of BatchNorm do, where a channel sticks out far (a detector of parts of pages, PicoDet: 0.2 to 11.7 dB by
    output become 13.4 to 25.2, with real pages it has 14.8 to 26).
    """
    if not _becomes_integers(job) or not shows_channels(job.source):
        return
    if kinds.kind_of(job.model) in (kinds.Kind.LANGUAGE, kinds.Kind.DENOISER):
        return
    narrow = job.scheme.weights.format.bits < EIGHT_BITS
    if narrow and job.scheme.activations.format.bits < EIGHT_BITS:
        return
    specs = layer_specs(job)
    wanted = {
        group.name: group
        for group in groups(job.model.graph, convolutions=True)
        if any(layer.node in specs for layer in group.layers)
    }
    found = [group for group in wanted.values() if is_foldable(group)]
    # Where activations are codes wherever a kernel has them, a constant behind a gate levels what it reads alone.
    gated = [
        gate
        for gate in gates(job.model.graph)
        if gate.group.name in wanted and (gate.is_read_directly or job.target.name == "cpu")
    ]
    if not found and not gated:
        return
    axes = axes_of([*found, *(gate.group for gate in gated)])
    for gate in gated:
        axes |= dict.fromkeys((gate.source.name or "", gate.result.name or ""), gate.group.axis)
    recorded = record(job, axes, LEVELLING_SAMPLES)

    def best(group: Group, seen: ChannelStatistics, tried: Sequence[Array], worth: float) -> Array:
        """The scale with the least error, if that is so many times less than with none."""
        tried = [np.ones(group.channels), *tried]
        errors = [expected_error(group, seen, scale, specs, job.scheme.activations) for scale in tried]
        index = int(np.argmin(errors))
        return tried[index] if errors[index] * worth < errors[0] else tried[0]

    # A hybrid of CIFAR-10 loses 3 dB to mild levelling by 12 samples, 0.7 by 32, and gains 0.4 by 128. With weights
    # of 4 bits a mild gain is none either: ResNet-8 and DS-CNN lose up to 2 dB to it.
    few = min(len(job.source), job.settings.samples or LEVELLING_SAMPLES) < LEVELLING_SAMPLES
    unsure = few or narrow or getattr(job.source, "is_made_up", False)
    worth = WORTH_WHEN_UNSURE if unsure else WORTH_FOLDING
    levels, by_name = {}, {group.name: group for group in found}  # levelled gates get other names
    for gate in gated:
        evened = _level(recorded[gate.source.name or ""], recorded[gate.result.name or ""])
        name = gate.group.name
        levels[name] = best(gate.group, recorded[name], [evened], WORTH_A_GATE)
    LevelGates(levels)(job.model)
    scales = {}
    for name, group in by_name.items():
        maxima, weights = recorded[name].maxima, weight_maxima(group)
        tried = [migration(maxima, weights, alpha) for alpha in LEVELLING_ALPHAS]
        scales[name] = best(group, recorded[name], tried, worth if _is_separable(group) else WORTH_AMONG_DENSE)
    SmoothActivations(scales, convolutions=True)(job.model)


def _is_separable(group: Group) -> bool:
    """Whether a convolution of the channels one by one makes the value or reads it."""

    def is_layer(node: ir.Node) -> bool:
        return layer_nodes.weighted(node) is not None

    nodes = [*(layer.node for layer in group.layers), *graphs.nearest_behind(group.value, is_layer, lambda node: True)]
    return any(node.attributes.get_int("group", 1) > 1 for node in nodes)


def _level(argument: ChannelStatistics, result: ChannelStatistics) -> Array:
    """What levels both what a gate tells apart of its argument and what it makes, as far as one number can.

    A whole number of the largest one's 255th parts, so that it can be stored in eight bits as it is.
    """
    reached = np.maximum(-np.maximum(argument.low, GATE_LOW), argument.high)
    level = np.sqrt(np.maximum(reached, 0) * result.maxima)
    step = level.max() / LARGEST_CODE + TINY
    return np.asarray(np.where(level > SILENT * level.max(), np.maximum(np.rint(level / step), 1), LARGEST_CODE) * step)


def _smooth_text_model(job: Job, alpha: float) -> None:
    """Smooth a model that reads text.

    What can be scaled without a node is, where that helps. A value that would need a Mul, as those behind the norms of
    an encoder whose shortcut reads them too, gets one where it halves the error of the layers that read it; and each
    token a scale of its own (see :class:`NormaliseTokens`) where that halves what is left.
    """
    specs, activations = layer_specs(job), job.scheme.activations
    found = [group for group in groups(job.model.graph) if any(layer.node in specs for layer in group.layers)]
    recorded = record(job, axes_of(found), TEXT_SAMPLES, rare_tokens=True)
    scales, tokenwise = {}, set[str]()
    for group in found:
        scale, alone = _treatment(group, recorded[group.name], alpha, specs, activations)
        scales[group.name] = scale
        if alone:
            tokenwise |= {layer.node.name or "" for layer in group.layers if is_tokenwise(layer)}
    SmoothActivations(scales, insert=True)(job.model)
    if tokenwise:
        SplitGemmBias()(job.model)
        NormaliseTokens(tokenwise)(job.model)


def _treatment(
    group: Group, statistics: ChannelStatistics, alpha: float, specs: Mapping[ir.Node, Spec], activations: Spec
) -> tuple[Array, bool]:
    """The scale of each channel, and whether tokens get scales: the least that no step further improves enough."""
    unchanged = np.ones(group.channels)
    smooth = migration(statistics.maxima, weight_maxima(group), alpha)
    # In the order of what they cost at run time; what is in one row costs the same.
    if is_foldable(group):
        ladder = [[(unchanged, False), (smooth, False)], [(unchanged, True), (smooth, True)]]
    else:
        ladder = [[(unchanged, False)], [(smooth, False)], [(unchanged, True)], [(smooth, True)]]
    treatments = [treatment for step in ladder for treatment in step]
    errors, power = output_errors(group, statistics, treatments, specs, activations, JUDGED_ROWS)
    # Each token counts the same: the squared error of one that is a thousand times larger would hide all others.
    shares = iter((errors / np.maximum(power, SMALLEST_POWER * power.max() + TINY)).mean(axis=1))
    chosen, least = treatments[0], np.inf
    for step in ladder:
        if least < GOOD_SHARE:
            break
        error, _, treatment = min((next(shares), place, treatment) for place, treatment in enumerate(step))
        if error * WORTH_A_NODE < least:
            chosen, least = treatment, error
    return chosen


def axes_of(found: Sequence[Group]) -> dict[str, int]:
    """The axis of channels of each group's value, by its name."""
    return {group.name: group.axis for group in found}


def layer_specs(job: Job) -> dict[ir.Node, Spec]:
    """How the weight of each node is going to be quantized."""
    return weight_specs(job.place(job.model.graph))


def record(
    job: Job, axes: Mapping[str, int], samples: int, *, rare_tokens: bool = False
) -> dict[str, ChannelStatistics]:
    """Run the float graph and keep statistics of the channels of some values.

    Args:
        job: The job.
        axes: The values, and their axes of channels.
        samples: Use at most so many samples.
        rare_tokens: Whether a model that reads text is shown random tokens too. Each token has channels of its own,
            which texts of a few thousand words do not show for most: levelled down to what was seen, they overflow
            when they come (stories260k: the divergence of its predictions, 0.9 to 2.6 % with texts alone, is 0.4 %).
    """
    total = min(samples, len(job.source), job.settings.samples or samples)
    with job.progress.stage("channels", "Recording channels", total) as advance:
        recorded = record_channels(
            job.model, axes, job.source, job.specs, samples=total, device=job.settings.device, on_batch=advance
        )
        further = _of_rare_tokens(job, axes) if rare_tokens else {}
        for name, statistics in further.items():  # their extremes alone: nobody writes so
            if statistics.low.size:
                recorded[name].low = np.minimum(recorded[name].low, statistics.low)
                recorded[name].high = np.maximum(recorded[name].high, statistics.high)
    return recorded


def _of_rare_tokens(job: Job, axes: Mapping[str, int]) -> dict[str, ChannelStatistics]:
    """Statistics of random tokens; of none where the model does not run on them, as it does on the user's.

    Of a token that no text has, as of one for padding whose row is zeros, it may make NaN too, which does not count.
    """
    rare = _rare_tokens(job)
    if rare is None:
        return {}
    try:
        return record_channels(
            job.model, axes, rare, job.specs, samples=len(rare), device=job.settings.device, only_finite=True
        )
    except OnnxqError:
        return {}


def _rare_tokens(job: Job) -> RandomTokens | None:
    """Random tokens in sequences as long as the samples', ``None`` for a model that reads something else."""
    roles = roles_of(job.specs)
    tokens = [name for name, role in roles.items() if role == "tokens"]
    if None in roles.values() or vocabulary_size(job.model, job.specs) is None:
        return None
    length = len(next(iter(job.source))[tokens[0]])
    count = -(-RARE_TOKENS // length)
    return RandomTokens(job.model, job.specs, count=count, seed=job.settings.seed, length=length)
