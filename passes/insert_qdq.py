"""Insert QuantizeLinear/DequantizeLinear pairs where a target's placement wants them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnxq import graph as graphs
from onnxq.formats import NumberFormat, parse_format
from onnxq.scheme import Spec
from onnxq.targets.placement import Site

# Keys of a QuantizeLinear's metadata: what calibration must know and the codes alone do not say.
FORMAT = "onnxq.format"
SYMMETRIC = "onnxq.symmetric"
SIGNED_SCALES = "onnxq.signed_scales"
STATISTICS = "onnxq.statistics"
CLIP = "onnxq.clip"  # on the Clip that narrows an odd width, whose bounds follow the scale


class InsertQDQ(InPlacePass):
    """Put one Q/DQ pair at every site, with scale and zero point as named initializers.

    Before::

        x ─────────────► Conv

    After::

        x ─► QuantizeLinear(x_scale, x_zero_point) ─► DequantizeLinear ─► Conv

    or, where ranges are dynamic::

        x ─► DynamicQuantizeLinear ═► DequantizeLinear ─► Conv

    Scales are 1 until calibration sets them. Sites whose values share a scale (``like``) share the initializers.
    A site without uses quantizes the value for all readers; a graph output keeps its name, and the float value
    under it is then called ``<name>_float``. Names that the model has already get an underscore behind them.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.sites = list(sites)

    def call(self, model: ir.Model) -> PassResult:
        """Insert the pairs."""
        names = graphs.Names(model.graph)
        for site in self.sites:
            _insert(model.graph, site, names)
        return PassResult(model, bool(self.sites))


def _insert(graph: ir.Graph, site: Site, names: graphs.Names) -> None:
    value = site.value
    if not site.uses and value.is_graph_output():
        _rename_output(value, names)
    if site.spec.dynamic:
        _insert_tape(graph, site, _dynamic_pair(site, names, _pair_suffix(graph, value.name or "")))
        return
    root = site.like or value
    scale, zero_point = _parameters(graph, site, root, names)
    tape = ir.tape.Tape()
    source = value
    suffix = _pair_suffix(graph, value.name or "")
    if not site.spec.format.fills_container and not value.is_initializer():
        # An odd width is 8-bit Q/DQ whose input never leaves the narrower range (weights are clipped when lowered).
        source = tape.op("Clip", [value, *_clip_bounds(graph, site, root, names)])
        source.name, source.type, source.shape = names.free(f"{value.name}_clipped{suffix}"), value.type, value.shape
    attributes: dict[str, int] = {}
    if site.axis is not None and site.spec.granularity != "tensor":
        attributes["axis"] = site.axis
        if site.spec.granularity == "block":
            attributes["block_size"] = site.spec.block_size or 0
    quantized = tape.op("QuantizeLinear", [source, scale, zero_point], attributes)
    dequantized = tape.op("DequantizeLinear", [quantized, scale, zero_point], attributes)
    quantized.name = names.free(f"{value.name}_quantized{suffix}")
    dequantized.name = names.free(f"{value.name}_dequantized{suffix}")
    quantized.type, dequantized.type = ir.TensorType(site.spec.format.storage), value.type
    quantized.shape = dequantized.shape = value.shape
    *clip, quantize, dequantize = tape.nodes
    for node in clip:
        node.name = names.free(f"{value.name}_clip{suffix}")
        node.metadata_props[CLIP] = site.spec.format.name
    quantize.name = names.free(f"{value.name}_Q{suffix}")
    dequantize.name = names.free(f"{value.name}_DQ{suffix}")
    quantize.metadata_props[FORMAT] = dequantize.metadata_props[FORMAT] = site.spec.format.name
    quantize.metadata_props[SYMMETRIC] = str(int(site.spec.symmetric))
    if site.spec.signed_scales:
        quantize.metadata_props[SIGNED_SCALES] = "1"
    quantize.metadata_props[STATISTICS] = _name(root)
    _insert_tape(graph, site, tape)


def spec_of(node: ir.Node) -> Spec:
    """Format and symmetry of a pair, and whether its scales have a sign, as its QuantizeLinear says of itself."""
    number_format, _ = parse_format(node.metadata_props[FORMAT])
    symmetric = node.metadata_props.get(SYMMETRIC, "1") == "1"
    return Spec(number_format, symmetric=symmetric, signed_scales=SIGNED_SCALES in node.metadata_props)


def _dynamic_pair(site: Site, names: graphs.Names, suffix: str) -> ir.tape.Tape:
    """The range is found while the model runs: the op gives scale and zero point beside the codes."""
    value, tape = site.value, ir.tape.Tape()
    codes, scale, zero_point = tape.op_multi_out("DynamicQuantizeLinear", [value], num_outputs=3)
    dequantized = tape.op("DequantizeLinear", [codes, scale, zero_point])
    made = {"quantized": codes, "scale": scale, "zero_point": zero_point, "dequantized": dequantized}
    for ending, output in made.items():
        output.name = names.free(f"{value.name}_{ending}{suffix}")
        in_bytes = ending in ("quantized", "zero_point")
        output.type = ir.TensorType(site.spec.format.storage) if in_bytes else ir.TensorType(ir.DataType.FLOAT)
        output.shape = value.shape if ending in ("quantized", "dequantized") else ir.Shape(())
    for node, ending in zip(tape.nodes, ("Q", "DQ"), strict=True):
        node.name = names.free(f"{value.name}_{ending}{suffix}")
    return tape


def _insert_tape(graph: ir.Graph, site: Site, tape: ir.tape.Tape) -> None:
    """Put a pair behind the value, and let the site's readers read its result."""
    value, dequantized = site.value, tape.nodes[-1].outputs[0]
    uses = site.uses or [use for use in graphs.consumers(value) if use[0] not in tape.nodes]
    producer = value.producer()
    if producer is None:
        first = next(node for node in graph if any(node is reader for reader, _ in uses))
        graph.insert_before(first, tape.nodes)
    else:
        graph.insert_after(producer, tape.nodes)
    for node, index in uses:
        node.replace_input_with(index, dequantized)
    if not site.uses and value.is_graph_output():
        position = next(index for index, output in enumerate(graph.outputs) if output is value)
        original = value.meta["onnxq.output_name"]
        graph.outputs[position] = dequantized
        dequantized.name = original


def _name(value: ir.Value) -> str:
    """The name that the value has in the float model."""
    name: str = value.meta.get("onnxq.output_name", value.name)
    return name


def _rename_output(value: ir.Value, names: graphs.Names) -> None:
    value.meta["onnxq.output_name"] = value.name
    value.name = names.free(f"{value.name}_float")


def _pair_suffix(graph: ir.Graph, name: str) -> str:
    """A suffix that keeps a second pair on the same value apart from the first."""
    pairs = graph.meta.setdefault("onnxq.qdq_pairs", {})
    count: int = pairs.get(name, 0)
    pairs[name] = count + 1
    return "" if count == 0 else f"_{count}"


def _parameters(graph: ir.Graph, site: Site, root: ir.Value, names: graphs.Names) -> tuple[ir.Value, ir.Value]:
    """The scale and zero-point initializers of the site: those of ``root`` if they are there already."""
    shape, number_format, ending = parameter_shape(site), site.spec.format, _ending(graph, site, root)
    made: dict[tuple[str, str], tuple[str, str]] = graph.meta.setdefault("onnxq.qdq_parameters", {})
    if (_name(root), ending) in made:
        scale_name, zero_point_name = made[_name(root), ending]
        return graph.initializers[scale_name], graph.initializers[zero_point_name]
    scale_name = names.free(f"{_name(root)}_scale{ending}")
    zero_point_name = names.free(f"{_name(root)}_zero_point{ending}")
    dtype = site.value.dtype or ir.DataType.FLOAT
    scale = ir.Value(name=scale_name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    scale.const_value = ir.tensor(np.ones(shape, dtype.numpy()), name=scale_name)
    zero_point = ir.Value(name=zero_point_name, shape=ir.Shape(shape), type=ir.TensorType(number_format.storage))
    zero_point.const_value = zero_point_tensor(np.zeros(shape), number_format, zero_point_name)
    graph.register_initializer(scale)
    graph.register_initializer(zero_point)
    made[_name(root), ending] = scale_name, zero_point_name
    return scale, zero_point


def _ending(graph: ir.Graph, site: Site, root: ir.Value) -> str:
    """What tells the parameters of this site from those that the same value has in another format or along an axis."""
    kinds = graph.meta.setdefault("onnxq.qdq_kinds", {}).setdefault(_name(root), [])
    kind = (str(site.spec), site.spec.format.storage, site.axis)
    if kind not in kinds:
        kinds.append(kind)
    return "" if kind == kinds[0] else f"_{site.spec.format.name}_{kinds.index(kind)}"


def zero_point_tensor(codes: np.ndarray, number_format: NumberFormat, name: str) -> ir.TensorProtocol:
    """Codes as a tensor of the format's container."""
    array = np.asarray(codes).astype(number_format.numpy_dtype)
    return ir.Tensor(array, dtype=number_format.storage, name=name)


def parameter_shape(site: Site) -> tuple[int, ...]:
    """The shape of the site's scale: () for a tensor, [channels], or the value's with blocks counted."""
    if site.axis is None or site.spec.granularity == "tensor":
        return ()
    if site.value.shape is None:
        raise ValueError(f"{site.value.name} needs a known shape for {site.spec}")
    sizes = [int(size) for size in site.value.shape]  # type: ignore[arg-type]
    if site.spec.granularity == "channel":
        return (sizes[site.axis],)
    sizes[site.axis] = -(-sizes[site.axis] // (site.spec.block_size or sizes[site.axis]))
    return tuple(sizes)


def _clip_bounds(graph: ir.Graph, site: Site, root: ir.Value, names: graphs.Names) -> list[ir.Value]:
    """The initializers of the narrow range, which follow the site's scale and are shared like it."""
    made: dict[str, str] = graph.meta.setdefault("onnxq.qdq_bounds", {})
    bounds = []
    ending = _ending(graph, site, root)
    for suffix, bound in (("clip_low", site.spec.format.low), ("clip_high", site.spec.format.high)):
        name = f"{_name(root)}_{suffix}{ending}"
        if name not in made:
            dtype = site.value.dtype or ir.DataType.FLOAT
            initializer = ir.Value(name=names.free(name), shape=ir.Shape(()), type=ir.TensorType(dtype))
            initializer.const_value = ir.tensor(np.asarray(bound, dtype.numpy()), name=initializer.name)
            graph.register_initializer(initializer)
            made[name] = initializer.name or ""
        bounds.append(graph.initializers[made[name]])
    return bounds
