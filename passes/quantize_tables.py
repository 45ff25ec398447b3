"""Keep tables that tokens are looked up in as codes, and read such tables back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.arithmetic import dequantize, quantize, scale_and_zero_point
from onnxq.calibration.signed_scales import scale_rows
from onnxq.calibration.weight_ranges import best_of_few
from onnxq.folding import array_of, new_initializer
from onnxq.formats import FORMATS, NumberFormat
from onnxq.passes.lower_packed_blocks import pack
from onnxq.passes.raise_packed_blocks import unpack
from onnxq.rewriting import InPlaceOf
from onnxq.scheme import Spec

FEWEST_NUMBERS = 1 << 14  # of a table; smaller ones, of segments say, are no part of a file
BLOCK_SIZE = 32  # of a row of 4-bit codes


class QuantizeTables(InPlacePass):
    """Codes for every row of a table, with a scale of its own: what is looked up is dequantized, and nothing else.

    Codes of 4 bits have a scale for each 32 of a row, in an op of onnxruntime's own (GatherBlockQuantized).

    Before::

        table (float [rows, width]) ─► Gather ─► x

    After::

        codes (int8 [rows, width]) ─► Gather ─► Cast ─┐
        scales (float [rows, 1]) ───► Gather ─────────┴► Mul ─► x

    Args:
        skipped: Names of nodes whose tables stay as they are.
        name: The format, ``int8`` or ``int4``.
    """

    def __init__(self, skipped: Collection[str] = (), name: str = "int8") -> None:
        super().__init__()
        self.skipped = set(skipped)
        self.write = {"int8": _write_rows, "int4": write_blocks}[name]

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every table that only lookups of rows read, with whatever many indices."""
        names = graphs.Names(model.graph)
        tables: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if _looks_up(node) and node.inputs[0] is not None:
                tables.setdefault(node.inputs[0], []).append(node)
        modified = False
        for table, lookups in tables.items():
            readers = [node for node, _ in graphs.consumers(table)]
            if all(node in lookups and node.name not in self.skipped for node in readers):
                self.write(model.graph, table, lookups, names)
                graphs.let_go(table)
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


class RaiseTables(InPlacePass):
    """Make float tables of tables of bytes, ours and those of other tools.

    Before::

        codes (int8 [rows, width]) ─► Gather ─► DequantizeLinear ─► x

    or what :class:`QuantizeTables` writes, or onnxruntime's GatherBlockQuantized.

    After::

        table (float [rows, width]) ─► Gather ─► x
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every one whose codes and scales are constant."""
        modified = False
        names = graphs.Names(model.graph)
        tables: dict[ir.Value | None, ir.Value] = {}  # one for each table of codes, however often it is read
        for node in list(model.graph):
            found = _of_rows(node) or _of_one_scale(node) or _of_blocks(node)
            if found is not None:
                lookup, values = found
                codes, indices = lookup.inputs[:2]
                if codes not in tables:
                    dtype = ir.DataType.from_numpy(values.dtype)
                    tables[codes] = new_initializer(model.graph, _float_name(lookup), values, dtype, names)
                whole = InPlaceOf(model.graph, node, names)
                whole.take_over(whole.op("lookup", "Gather", [tables[codes], indices], {"axis": 0}))
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _looks_up(node: ir.Node) -> bool:
    """Whether a node reads rows of a large constant table of floats, which ones the input says."""
    return graphs.is_op(node, "Gather") and layer_nodes.is_lookup(node) and is_large(node.inputs[0], (2,))


def is_large(table: ir.Value | None, axes: Collection[int]) -> bool:
    """Whether a table of floats has one of these numbers of axes, and so many numbers that codes save something."""
    if table is None or table.dtype != ir.DataType.FLOAT or table.shape is None or not table.shape.is_static():
        return False
    sizes = table.shape.numpy()
    return len(sizes) in axes and int(np.prod(sizes)) >= FEWEST_NUMBERS


def _write_rows(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node], names: graphs.Names) -> None:
    rows = array_of(table)
    scales, _ = scale_and_zero_point(rows.min(axis=1), rows.max(axis=1), FORMATS["int8"], symmetric=True)
    codes = quantize(rows, scales, None, FORMATS["int8"], axis=0)
    stored = new_initializer(graph, f"{table.name}_quantized", codes, ir.DataType.INT8, names)
    steps = new_initializer(graph, f"{table.name}_scale", scales[:, None], ir.DataType.FLOAT, names)
    for node in lookups:
        apart = InPlaceOf(graph, node, names)
        found = apart.op("codes", "Gather", [stored, node.inputs[1]], {"axis": 0})
        found.type = ir.TensorType(ir.DataType.INT8)
        step = apart.op("scales", "Gather", [steps, node.inputs[1]], {"axis": 0})
        step.type = ir.TensorType(ir.DataType.FLOAT)
        number = apart.as_type("floats", found, ir.DataType.FLOAT)
        apart.take_over(apart.op("dequantized", "Mul", [number, step]))


def write_blocks(
    graph: ir.Graph,
    table: ir.Value,
    lookups: Sequence[ir.Node],
    names: graphs.Names,
    number_format: NumberFormat = FORMATS["int4"],
    block_size: int = BLOCK_SIZE,
) -> None:
    """Write lookups along the first axis of a table as those of codes in blocks along its last.

    Args:
        graph: Changed in place.
        table: What all of them read [entries, ..., width], floats.
        lookups: Gather, or GatherND with one index each.
        names: The graph's names.
        number_format: Signed integers of 4 or 8 bits.
        block_size: Codes that share a scale, a power of two from 16.
    """
    spec = Spec(number_format, signed_scales=True)
    numbers = array_of(table)
    last = numbers.ndim - 1
    filled = np.pad(numbers, [*[(0, 0)] * last, (0, -numbers.shape[-1] % block_size)])
    blocks = filled.reshape(-1, block_size)
    scales, _ = scale_rows(blocks, *best_of_few(blocks, spec.format, spec.symmetric), spec)
    scales = scales.reshape(*numbers.shape[:-1], -1)
    codes = quantize(numbers, scales, None, spec.format, axis=last, block_size=block_size).astype(np.int16)
    middle = 1 << number_format.bits - 1
    packed = pack(codes + middle, number_format.bits)  # in bytes, which a branch may read of the main graph
    stored = new_initializer(graph, f"{table.name}_quantized", packed, ir.DataType.UINT8, names)
    steps = new_initializer(graph, f"{table.name}_scale", scales, ir.DataType.FLOAT, names)
    for node in lookups:
        apart, indices = InPlaceOf(graph, node, names), node.inputs[1]
        if graphs.is_op(node, "GatherND"):
            indices = apart.op("indices", "Squeeze", [indices, apart.integers("last", [-1])])
        sizes = {"gather_axis": 0, "quantize_axis": last, "block_size": block_size, "bits": number_format.bits}
        read = [stored, indices, steps]
        apart.take_over(apart.main("GatherBlockQuantized", read, sizes, domain=graphs.ONNXRUNTIME_DOMAIN))
    graph.opset_imports.setdefault(graphs.ONNXRUNTIME_DOMAIN, 1)


def _of_rows(node: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    """The lookup that a Mul of ours dequantizes, and the numbers of its table."""
    if not graphs.is_op(node, "Mul"):
        return None
    cast, scales = (None if value is None else value.producer() for value in node.inputs)
    codes = cast.inputs[0].producer() if graphs.is_op(cast, "Cast") and cast and cast.inputs[0] else None
    if not (_reads_codes(codes) and graphs.is_op(scales, "Gather")) or codes is None or scales is None:
        return None
    if codes.inputs[1] is not scales.inputs[1] or not graphs.is_constant(scales.inputs[0]):
        return None
    numbers, steps = array_of(codes.inputs[0]), array_of(scales.inputs[0])
    return (codes, dequantize(numbers, steps[:, 0], axis=0)) if steps.shape == (len(numbers), 1) else None


def _of_one_scale(node: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    """The lookup behind which a DequantizeLinear has one scale for all rows, and the numbers of its table."""
    codes = node.inputs[0].producer() if graphs.is_dequantize(node) and node.inputs[0] is not None else None
    parameters = [value for value in node.inputs[1:] if value is not None]
    if codes is None or not _reads_codes(codes) or not all(map(graphs.is_constant, parameters)):
        return None
    scale, *zero_points = (array_of(value) for value in parameters)
    if scale.size != 1:
        return None
    zero_point = zero_points[0].reshape(()) if zero_points else None
    return codes, dequantize(array_of(codes.inputs[0]), scale.reshape(()), zero_point)


def _of_blocks(node: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    """A lookup in a table whose rows are codes in blocks, in onnxruntime's own op, and the numbers of the table."""
    if node.op_type != "GatherBlockQuantized" or node.domain != graphs.ONNXRUNTIME_DOMAIN:
        return None
    constants = [node.inputs[0], *node.inputs[2:]]
    if not all(graphs.is_constant(value) for value in constants):
        return None
    codes, scales, *zeros = (array_of(value) for value in constants)
    bits, block_size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    last = codes.ndim - 1
    axes = node.attributes.get_int("gather_axis", 0), node.attributes.get_int("quantize_axis", 1)
    if codes.ndim < 2 or codes.dtype.kind == "f" or axes[0] != 0 or axes[1] not in (-1, last):
        return None
    zero_point = zeros[0] if zeros else None
    if codes.dtype == np.uint8:
        codes = unpack(codes, bits)
        middle = np.full(scales.shape, 1 << bits - 1)
        zero_point = middle if zero_point is None else unpack(zero_point, bits)[..., : scales.shape[last]]
    values = dequantize(codes, scales, zero_point, axis=last, block_size=block_size, dtype=scales.dtype)
    return node, values


def _reads_codes(node: ir.Node | None) -> bool:
    """Whether a node reads rows of a constant table of integers."""
    if node is None or not graphs.is_op(node, "Gather") or node.attributes.get_int("axis", 0) != 0:
        return False
    table = node.inputs[0]
    return table is not None and graphs.is_constant(table) and table.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _float_name(lookup: ir.Node) -> str:
    table = lookup.inputs[0]
    return (table.name or "table").removesuffix("_quantized") if table is not None else "table"
