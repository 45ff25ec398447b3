"""One 8-bit master from which weights of every narrower width are made: codes, and a scale for each width and channel.

Source: the storage form compared in K. Xu, Q. Feng, X. Zhang, D. Wang, MultiQuant: Training Once for Multi-bit
Quantization of Neural Networks, IJCAI 2022, and its successors. A scale of its own for each width makes the 8-bit
master as good a source as the float weight; sharing scales between widths, or cutting off low bits, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq.arithmetic import quantize, scale_and_zero_point
from onnxq.calibration.calibrate import rows_of
from onnxq.calibration.weight_ranges import least_error
from onnxq.errors import OnnxqError
from onnxq.folding import array_of, new_initializer
from onnxq.formats import parse_format

Array = np.ndarray[Any, Any]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
TABLE = "onnxq.scales"  # metadata of a weight's DequantizeLinear: the name of its table of scales


def master_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The DequantizeLinear nodes of constant int8 weights with symmetric scales."""
    return [
        node
        for node in graph
        if graphs.is_dequantize(node)
        and graphs.is_constant(node.inputs[0])
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.INT8
        and not node.attributes.get_int("block_size", 0)
    ]


def scale_table(codes: Array, scale: Array, node: ir.Node) -> Array:
    """The scale of every width, [widths, …]: the least squared error against the master, whose own is the last.

    Args:
        codes: The master, int8.
        scale: Its scales.
        node: The DequantizeLinear, for the axis.
    """
    rows = rows_of(codes, scale.shape, node).astype(np.float32) * scale.reshape(-1, 1)
    found = []
    for bits in WIDTHS[:-1]:
        number_format, _ = parse_format(f"int{bits}")
        low, high = least_error(rows, number_format, True, 2.0)
        step, _ = scale_and_zero_point(low, high, number_format, symmetric=True)
        found.append(step.reshape(scale.shape))
    return np.stack([*found, scale]).astype(np.float32)


def attach_tables(model: ir.Model, learned: Mapping[str, Array] = MappingProxyType({})) -> int:
    """Store the table of every weight beside its master; returns how many there are.

    Args:
        model: With int8 codes for weights.
        learned: Scales of the widths below the master's, [widths, …], by the name of the rounded weight; weights that
            are not there get those of the least error.
    """
    nodes = master_nodes(model.graph)
    for node in nodes:
        codes, scale = array_of(node.inputs[0]), array_of(node.inputs[1])
        assert node.inputs[0] is not None
        name = f"{node.inputs[0].name}_scales"
        own = learned.get(node.outputs[0].name or "")
        scales = scale_table(codes, scale, node) if own is None else np.concatenate([own, scale[None]])
        table = new_initializer(model.graph, name, scales.astype(np.float32), ir.DataType.FLOAT)
        node.metadata_props[TABLE] = table.name or name
    return len(nodes)


def export_width(model: ir.Model, bits: int) -> int:
    """Requantize every master to a width with its own scales, and drop the tables; returns how many there are.

    Codes keep their int8 container, so that kernels stay those of the master.

    Raises:
        OnnxqError: the width is unknown, or the model holds no tables.
    """
    if bits not in WIDTHS:
        raise OnnxqError(f"expected a width from {WIDTHS[0]} to {WIDTHS[-1]} bits, found {bits}", hint="use --bits 4")
    nodes = [node for node in model.graph if TABLE in node.metadata_props]
    if not nodes:
        raise OnnxqError(
            "expected a model with tables of scales, found none",
            hint="make one with `onnxq quantize --recipe multiquant`",
        )
    number_format, _ = parse_format(f"int{bits}")
    for node in nodes:
        name = node.metadata_props.pop(TABLE)
        if name not in model.graph.initializers:
            raise OnnxqError(
                f"expected the table {name!r} of {node.name!r}, found nothing", hint="another tool has removed it"
            )
        codes, scale = (*node.inputs, None, None)[:2]
        tables = array_of(model.graph.initializers[name])
        whole = graphs.is_dequantize(node) and graphs.is_constant(codes) and graphs.is_constant(scale)
        if (
            not whole
            or codes is None
            or scale is None
            or tables.shape != (len(WIDTHS), *array_of(scale).shape)
            or not _fits(array_of(codes).shape, tables.shape[1:], node.attributes.get_int("axis", 1))
        ):
            raise OnnxqError(
                f"expected codes, a scale and one scale for each width beside {node.name!r}, found others",
                hint="another tool has changed the model; make it again with `onnxq quantize --recipe multiquant`",
            )
        table = tables[WIDTHS.index(bits)]
        axis = node.attributes.get_int("axis", 1) % array_of(codes).ndim if table.ndim else None
        if bits < WIDTHS[-1]:
            old = array_of(codes).astype(np.float32)
            shape = [-1 if index == axis else 1 for index in range(old.ndim)] if axis is not None else []
            values = old * array_of(scale).astype(np.float32).reshape(shape)
            fresh = quantize(values, table, None, number_format, axis=axis).astype(np.int8)
            node.replace_input_with(0, new_initializer(model.graph, f"{codes.name}_{bits}", fresh, ir.DataType.INT8))
            dtype = scale.dtype or ir.DataType.FLOAT
            step = new_initializer(model.graph, f"{scale.name}_{bits}", table.astype(dtype.numpy()), dtype)
            node.replace_input_with(1, step)
            for value in (codes, scale):
                if not value.uses():
                    del model.graph.initializers[value.name or ""]
        del model.graph.initializers[name]
    return len(nodes)


def _fits(codes: tuple[int, ...], scale: tuple[int, ...], axis: int) -> bool:
    """Whether there is one scale, or one for each index of an axis that the codes have."""
    return not scale or (-len(codes) <= axis < len(codes) and scale == (codes[axis],))
