"""Let a layer compute the sum of several weights, the orders of a residual expansion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq import layer_nodes
from onnxq.folding import array_of, new_initializer
from onnxq.weights.residuals import Order

Array = np.ndarray[Any, Any]
FORMS = ("channels", "branches")


class ExpandResiduals(InPlacePass):
    """Replace W by W₁ + W₂ + … inside a layer, in a form whose every product runs on integers.

    Before::

        y = Conv(x, W, b)

    After, with ``channels``: one wider layer, each order a run of its output channels::

        c = Conv(x, [W₁; W₂], [b; 0])
        y = c[:, :C] + c[:, C:]

    After, with ``branches``: a layer for each order, which run side by side where there is room::

        y = Conv(x, W₁, b) + Conv(x, W₂)

    An order that keeps only some units gets output channels for those alone; a Gather puts them in their places, and
    one channel of zeros in all others. In a grouped convolution the units are the groups, and their inputs are
    repeated by a Gather. The bias counts once.

    Args:
        orders: The orders of layers, by the name of the node; one order changes nothing.
        form: ``channels`` or ``branches``.
    """

    def __init__(self, orders: Mapping[str, Sequence[Order]], form: str = "channels") -> None:
        super().__init__()
        self.orders = dict(orders)
        self.form = form

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the layers."""
        modified = False
        for item in list(layer_nodes.weighted_nodes(model.graph)):
            orders = self.orders.get(item.node.name or "", [])
            if len(orders) > 1 and is_expandable(item):
                _Layer(model.graph, item).rewrite(orders, self.form)
                modified = True
        return PassResult(model, modified)


def is_expandable(item: layer_nodes.WeightedNode) -> bool:
    """Whether the layer has a constant weight on the right, of known shape, and a bias that is constant if any."""
    weight = item.weight
    if item.weight_index != 1 or not graphs.is_constant(weight) or weight is None or weight.shape is None:
        return False
    if item.node.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    bias = item.node.inputs[2] if len(item.node.inputs) > 2 else None
    if bias is None:
        return True
    return graphs.is_constant(bias) and int(array_of(bias).size) in (1, int(array_of(weight).shape[item.channel_axis]))


class _Layer:
    """One layer on its way to the sum."""

    def __init__(self, graph: ir.Graph, item: layer_nodes.WeightedNode) -> None:
        self.graph, self.item, self.node = graph, item, item.node
        assert item.weight is not None and item.weight.dtype is not None
        self.weight, self.dtype = item.weight, item.weight.dtype
        self.shape = array_of(item.weight).shape
        self.channels = self.shape[item.channel_axis]
        self.groups = self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1
        self.axis = 1 if self.node.op_type == "Conv" else -1
        self.tape = ir.tape.Tape()

    def rewrite(self, orders: Sequence[Order], form: str) -> None:
        output = self.node.outputs[0]
        if form == "branches":
            terms = [self._product([order], index) for index, order in enumerate(orders)]
            terms = [self._placed(term, order, 0) for term, order in zip(terms, orders, strict=True)]
        else:
            together = self._product(orders, 0)
            starts = np.cumsum([0, *(order.weight.shape[0] * order.weight.shape[1] for order in orders)])
            terms = [self._placed(together, order, int(start)) for order, start in zip(orders, starts, strict=False)]
        total = terms[0]
        for index, term in enumerate(terms[1:], start=1):
            total = self._op("Add", [total, term], f"sum_{index}")
        self.graph.insert_before(self.node, self.tape.nodes)
        ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        total.name, total.type, total.shape = output.name, output.type, output.shape

    def _op(self, op_type: str, inputs: Sequence[ir.Value | None], ending: str, **attributes: int) -> ir.Value:
        result = self.tape.op(op_type, inputs, attributes)
        result.name, result.type = f"{self.node.outputs[0].name}_{ending}", self.node.outputs[0].type
        self.tape.nodes[-1].name = f"{self.node.name}_{ending}"
        return result

    def _constant(self, ending: str, array: Array, dtype: ir.DataType) -> ir.Value:
        return new_initializer(self.graph, f"{self.weight.name}_{ending}", array.astype(dtype.numpy()), dtype)

    def _is_whole(self, order: Order) -> bool:
        return int(order.weight.shape[0] * order.weight.shape[1]) == int(self.channels)

    def _product(self, orders: Sequence[Order], first: int) -> ir.Value:
        """The layer with the orders one after the other as its output channels, and a unit of zeros if some need it."""
        weights, kept = [order.weight for order in orders], [order.kept for order in orders]
        if not all(self._is_whole(order) for order in orders):
            weights.append(np.zeros_like(weights[0][:1]))
            kept.append(np.zeros(1, np.int64))
        rows = np.concatenate([weight.reshape(-1, weight.shape[-1]) for weight in weights])
        rest = [size for axis, size in enumerate(self.shape) if axis != self.item.channel_axis]
        stacked = np.moveaxis(rows.reshape(len(rows), *rest), 0, self.item.channel_axis)
        ending = "orders" if len(orders) > 1 else f"order_{first + 1}"
        inputs = [self.node.inputs[0], self._constant(ending, np.ascontiguousarray(stacked), self.dtype)]
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is not None and first == 0:
            padded = np.zeros(len(rows))
            padded[: self.channels] = array_of(bias).reshape(-1)
            inputs.append(self._constant(f"{ending}_bias", padded, bias.dtype or self.dtype))
        attributes: dict[str, Any] = dict(self.node.attributes)
        if self.groups > 1:
            # Every group of the stacked layer reads the channels that its unit reads.
            units, size = np.concatenate(kept), self.shape[1]
            attributes["group"] = len(units)
            if not np.array_equal(units, np.arange(self.groups)):
                channels = (units[:, None] * size + np.arange(size)).reshape(-1)
                index = self._constant(f"{ending}_inputs", channels, ir.DataType.INT64)
                inputs[0] = self._op("Gather", [inputs[0], index], f"{ending}_inputs", axis=1)
        result = self.tape.op(self.node.op_type, inputs, attributes)
        result.name = f"{self.node.outputs[0].name}_{ending}"
        result.type, result.shape = self.node.outputs[0].type, _widened(self.node.outputs[0], self.axis, len(rows))
        self.tape.nodes[-1].name = (self.node.name or "") if first == 0 else f"{self.node.name}_{ending}"
        return result

    def _placed(self, source: ir.Value, order: Order, start: int) -> ir.Value:
        """One order's channels out of the product, each in its place."""
        width = order.weight.shape[1]
        count = order.weight.shape[0] * width
        ending = f"at_{start}" if start else "at_first"
        ending = f"{source.name}_{ending}".removeprefix(f"{self.node.outputs[0].name}_")
        if self._is_whole(order):
            size = None if source.shape is None else source.shape[self.axis]
            if start == 0 and size == count:
                return source
            bounds = [np.asarray([value]) for value in (start, start + count, self.axis)]
            names = ("starts", "ends", "axes")
            constants = [
                self._constant(f"{ending}_{name}", bound, ir.DataType.INT64)
                for name, bound in zip(names, bounds, strict=True)
            ]
            value = self._op("Slice", [source, *constants], ending)
        else:
            zeros = _size(source, self.axis) - width
            places = np.arange(width) + np.full((self.channels // width, 1), zeros)
            places[order.kept] = start + np.arange(count).reshape(-1, width)
            index = self._constant(f"{ending}_places", places.reshape(-1), ir.DataType.INT64)
            value = self._op("Gather", [source, index], ending, axis=self.axis)
        value.shape = _widened(source, self.axis, self.channels)
        return value


def _widened(value: ir.Value, axis: int, size: int) -> ir.Shape | None:
    """The value's shape with another size along the axis of channels."""
    if value.shape is None:
        return None
    sizes = list(value.shape)
    sizes[axis] = size
    return ir.Shape(sizes)


def _size(value: ir.Value, axis: int) -> int:
    node = value.producer()
    assert node is not None
    item = layer_nodes.weighted(node)
    assert item is not None
    return int(array_of(item.weight).shape[item.channel_axis])
