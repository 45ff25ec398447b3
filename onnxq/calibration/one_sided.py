"""Which activations lie on one side of zero, so that symmetric codes waste half of what they have."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.calibration.observers import Observer, Statistics
from onnxq.job import Job
from onnxq.passes.insert_qdq import STATISTICS, SYMMETRIC, spec_of
from onnxq.passes.shift_to_symmetric import shiftable_readers

LEAST_GAIN = 1.3  # of the step: 2.3 dB; a value in [-1, 2] is below it


def free_zero_points(job: Job, statistics: Mapping[str, Statistics], observe: Observer) -> list[str]:
    """Give one-sided activations a zero point where codes are symmetric; lowering for TensorRT makes a shift of it.

    Args:
        job: Its graph has Q/DQ, without scales yet.
        statistics: Of the activations.
        observe: How a range follows from them.

    Returns:
        The names of those values; none where all zero points are free anyway.
    """
    shared: dict[ir.Value, list[ir.Node]] = {}
    for node in job.model.graph:
        if graphs.is_quantize(node) and not graphs.is_constant(node.inputs[0]) and node.inputs[1] is not None:
            shared.setdefault(node.inputs[1], []).append(node)
    freed = []
    for quantizers in shared.values():
        name, spec = quantizers[0].metadata_props[STATISTICS], spec_of(quantizers[0])
        number_format = spec.format
        zero_point = quantizers[0].inputs[2]
        if not spec.symmetric or number_format.is_float or zero_point is None:
            continue
        if zero_point.dtype != ir.DataType.INT8 or not all(shiftable_readers(node) for node in quantizers):
            continue
        if number_format.bits < 8 and statistics[name].low >= 0:
            continue  # its container holds the codes 0 ... 2^b - 1 without a zero point
        around, beside = (observe(statistics[name], number_format, symmetric) for symmetric in (True, False))
        if max(-around.low, around.high) > LEAST_GAIN * (beside.high - beside.low) / 2 > 0:
            for node in quantizers:
                node.metadata_props[SYMMETRIC] = "0"
            freed.append(name)
    job.measurements["shifted_activations"] = len(freed)
    return freed
