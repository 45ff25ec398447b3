"""What a model is for, told from its graph: defaults, calibration inputs and judgement depend on it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.attention import attention_products
from onnxq.calibration.batch_axis import whole_inputs


class Kind(enum.Enum):
    """What a model is, as far as its graph tells."""

    CNN = "cnn"
    TRANSFORMER = "transformer"
    DENOISER = "denoiser"
    LANGUAGE = "language"


def kind_of(model: ir.Model) -> Kind:
    """Tell model kinds apart from inputs, outputs and ops alone.

    A denoiser takes a sample and a timestep and returns something of the sample's shape. A language model takes
    integer tokens, looks them up and returns a float for each. A transformer has an Attention, or multiplies a Softmax
    with something.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    outputs = list(model.graph.outputs)
    if len(inputs) >= 2 and outputs and _takes_a_timestep(inputs, outputs):
        return Kind.DENOISER
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    takes_tokens = bool(inputs) and inputs[0].dtype in integers and any(graphs.rank(value) == 2 for value in inputs)
    if takes_tokens and any(graphs.is_float(value) and graphs.rank(value) in (2, 3) for value in outputs):
        return Kind.LANGUAGE
    attends = any(graphs.is_op(node, "Attention") for node in model.graph)
    attends = attends or next(attention_products(model.graph), None) is not None
    return Kind.TRANSFORMER if attends else Kind.CNN


def _takes_a_timestep(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> bool:
    states = whole_inputs(inputs)  # of a recurrent network, which returns its new one: no sample
    samples = [
        value
        for value in inputs
        if graphs.is_float(value) and (graphs.rank(value) or 0) >= 3 and value.name not in states
    ]
    timesteps = [value for value in inputs if graphs.rank(value) in (0, 1)]
    return bool(timesteps) and any(
        graphs.rank(sample) == graphs.rank(output) and _same_inner_sizes(sample, output)
        for sample in samples
        for output in outputs
    )


def _same_inner_sizes(first: ir.Value, second: ir.Value) -> bool:
    """Whether all axes after batch and channels agree where both are known."""
    pairs = zip(list(first.shape or ())[2:], list(second.shape or ())[2:], strict=True)
    return all(not isinstance(a, int) or not isinstance(b, int) or a == b for a, b in pairs)
