"""What a model is for, told from its graph: defaults, calibration inputs and judgement depend on it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.attention import attention_products
from onnxq.calibration.batch_axis import whole_inputs
from onnxq.calibration.data import input_specs
from onnxq.calibration.picture_size import apart
from onnxq.diffusion.timestep_input import becomes_waves, is_called_timestep

Size = int | ir.SymbolicDim | None


class Kind(enum.Enum):
    """What a model is, as far as its graph tells."""

    CNN = "cnn"
    TRANSFORMER = "transformer"
    DENOISER = "denoiser"
    LANGUAGE = "language"


def kind_of(model: ir.Model) -> Kind:
    """Tell model kinds apart from inputs, outputs and ops alone.

    A denoiser takes a sample and a timestep and returns something of the sample's shape (see :func:`channel_axis`). A
    language model takes integer tokens, looks them up and returns a float for each. A transformer has an Attention, or
    multiplies a Softmax with something.
    """
    follow = {spec.name for spec in apart(input_specs(model))[1]}  # sizes of a picture are no tokens
    inputs = [value for value in model.graph.inputs if not value.is_initializer() and value.name not in follow]
    outputs = list(model.graph.outputs)
    if len(inputs) >= 2 and outputs and _takes_a_timestep(inputs, outputs):
        return Kind.DENOISER
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    takes_tokens = bool(inputs) and inputs[0].dtype in integers and any(graphs.rank(value) == 2 for value in inputs)
    if takes_tokens and any(graphs.is_float(value) and graphs.rank(value) in (2, 3) for value in outputs):
        return Kind.LANGUAGE
    attends = any(graphs.is_op(node, "Attention") or layer_nodes.is_fused_attention(node) for node in model.graph)
    attends = attends or next(attention_products(model.graph), None) is not None
    return Kind.TRANSFORMER if attends else Kind.CNN


def channel_axis(sample: Sequence[Size], output: Sequence[Size]) -> int | None:
    """The axis of channels of a denoiser's sample, if an output could be its prediction.

    Args:
        sample: The shape of an input; sizes that are no numbers are free.
        output: The shape of an output. It is that of the sample, but for one axis: twice as long it predicts a variance
            too; shorter, the sample has channels beside its noise (inpainting, super-resolution, video from a picture).

    Returns:
        The axis, which is 1 where the shapes agree; ``None`` if the output is no prediction.
    """
    if len(sample) != len(output) or len(sample) < 2:
        return None
    known = [
        (a, b) if isinstance(a, int) and isinstance(b, int) else (1, 1) for a, b in zip(sample, output, strict=True)
    ]
    other = [axis for axis, (a, b) in enumerate(known) if axis and a != b]
    if not other:
        return 1
    have, found = known[other[0]]
    return other[0] if len(other) == 1 and (found < have or found == 2 * have) else None


def _takes_a_timestep(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> bool:
    states = whole_inputs(inputs)  # of a recurrent network, which returns its new one: no sample
    timesteps = [value for value in inputs if graphs.rank(value) in (0, 1) and value.dtype != ir.DataType.BOOL]
    is_sure = any(is_called_timestep(value.name) or becomes_waves(value) for value in timesteps)
    least_rank = 2 if is_sure else 3
    samples = [
        value
        for value in inputs
        if graphs.is_float(value) and (graphs.rank(value) or 0) >= least_rank and value.name not in states
    ]
    return bool(timesteps) and any(
        _may_predict(list(sample.shape or ()), list(output.shape or ()), is_sure)
        for sample in samples
        for output in outputs
    )


def _may_predict(sample: Sequence[Size], output: Sequence[Size], is_sure: bool) -> bool:
    """Whether the output is a prediction of the sample; features and masks of pictures have other channels, too."""
    axis = channel_axis(sample, output)
    if axis is None or is_sure:
        return axis is not None
    have, found = sample[axis], output[axis]
    return axis == 1 and not (isinstance(have, int) and isinstance(found, int) and found < have)
