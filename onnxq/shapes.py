"""Types and shapes of every value, also where sizes are absurd.

onnx's inference follows the shapes that a graph computes: for each vector it keeps a list of one entry per element. A
vector of 2^31 elements, or a damaged number that says so, takes it minutes and all memory. So shapes are inferred
without that first; it is done only if they show every vector to be short, and where they do not show it, in a child
process that may fail.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import machine, shape_worker
from onnxq.errors import OnnxqError
from onnxq.passes.expand_attention import with_attention_apart

LONGEST_VECTOR = 1 << 20  # elements: more than any shape has, and no burden to inference
LARGE_INITIALIZER_BYTES = 1000  # holds no shape, so that inference needs only its type
NOT_YET_KNOWN = "unk__"  # how inference names sizes that following the graph's own shapes may give
FAILURES = (onnx.shape_inference.InferenceError, RuntimeError, ValueError, MemoryError)  # what the C++ raises
CHILD_SECONDS = 10
CHILD_BYTES = 1 << 30
UNSIZED = (None, ir.DataType.UNDEFINED, ir.DataType.STRING)
SHARE_OF_MEMORY = 4  # calibration holds a value, a copy, and what it computes of it


def infer(model: ir.Model) -> None:
    """Give every value a type and a shape, as far as onnx's inference knows them; what breaks it is left as it is."""
    expanded = with_attention_apart(model)
    if expanded is not model:  # onnx knows nothing of onnxruntime's ops
        infer(expanded)
        known = graphs.values(model.graph)
        for name, value in graphs.values(expanded.graph).items():
            if (same := known.get(name)) is not None:
                same.type, same.shape = value.type or same.type, value.shape or same.shape
        return
    try:
        data = _without_weights(model).SerializeToString()
        inferred = onnx.shape_inference.infer_shapes(data, check_type=True, strict_mode=True)
        if _has_short_vectors(inferred.graph):
            with contextlib.suppress(*FAILURES):
                inferred = onnx.shape_inference.infer_shapes(data, check_type=True, strict_mode=True, data_prop=True)
        else:
            inferred = _infer_in_child(data) or inferred
    except FAILURES:
        return
    _take_over(model.graph, inferred.graph)


def free_negative(model: ir.Model) -> None:
    """Make sizes of -1 free ones: some exporters write that, and shape inference would count with it."""
    for graph in model.graphs():
        values = itertools.chain(graph.inputs, graph.outputs, *(node.outputs for node in graph))
        for value in values:
            if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
                value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def check_sizes(model: ir.Model, name: str) -> None:
    """Refuse a model with a value that is too large for this machine before anything computes it.

    Raises:
        OnnxqError: a value of known shape takes more than a quarter of the memory.
    """
    limit = machine.memory_bytes() // SHARE_OF_MEMORY
    for value in graphs.values(model.graph).values():
        count = elements(value)
        if count is None or value.is_initializer():
            continue
        size = count * (64 if value.dtype in UNSIZED else value.dtype.bitwidth) // 8
        if size > limit:
            raise OnnxqError(
                f"expected values of {name} to fit in memory, found {value.name!r} of shape "
                f"{list(value.shape or ())}: {size / 2**30:.3g} GiB",
                hint=f"check the sizes in the model; no value may take more than {limit / 2**30:.3g} GiB here",
            )


def elements(value: ir.Value) -> int | None:
    """How many elements a value has, if its shape is known."""
    if value.shape is None:
        return None
    sizes = [size for size in value.shape if isinstance(size, int) and size >= 0]  # some exporters write -1 for free
    return math.prod(sizes) if len(sizes) == len(value.shape) else None


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model in onnx's own form, in which large initializers are inputs of their type."""
    kept: dict[str, ir.TensorProtocol] = {}
    initializers = model.graph.initializers
    try:
        for name, value in initializers.items():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= LARGE_INITIALIZER_BYTES:
                continue
            kept[name] = tensor
            value.const_value = ir.ExternalTensor(
                "elsewhere",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir="",
            )
        proto = ir.to_proto(model)
    finally:
        for name, tensor in kept.items():
            initializers[name].const_value = tensor
    graph = proto.graph
    typed = {info.name for info in graph.input}
    small = []
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            small.append(tensor)
        elif tensor.name not in typed:
            info = graph.input.add(name=tensor.name)
            info.type.tensor_type.elem_type = tensor.data_type
            for size in tensor.dims:
                info.type.tensor_type.shape.dim.add(dim_value=size)
            info.type.tensor_type.shape.SetInParent()  # a scalar has one, too
    del graph.initializer[:]
    graph.initializer.extend(small)
    return proto


def _has_short_vectors(graph: onnx.GraphProto) -> bool:
    """Whether every value of the graph is known to be no long vector."""
    infos = (*graph.input, *graph.value_info, *graph.output)
    given = {info.name for info in graph.input}
    for info in infos:
        if info.type.WhichOneof("value") not in ("tensor_type", None):
            continue
        kind = info.type.tensor_type
        if not kind.HasField("shape"):
            return False
        if len(kind.shape.dim) != 1:
            continue
        size = kind.shape.dim[0]
        if size.HasField("dim_value"):
            if size.dim_value > LONGEST_VECTOR:
                return False
        elif info.name not in given and (not size.dim_param or size.dim_param.startswith(NOT_YET_KNOWN)):
            return False
    typed = {info.name for info in infos}
    for node in graph.node:
        if any(name and name not in typed for name in node.output):
            return False
        inner = [found for attribute in node.attribute for found in (*attribute.graphs, attribute.g) if found.node]
        if not all(map(_has_short_vectors, inner)):
            return False
    return True


def _infer_in_child(data: bytes) -> onnx.ModelProto | None:
    """The model with all shapes; ``None`` if that takes too long, too much memory, or fails."""
    extension = find_spec("onnx.onnx_cpp2py_export")
    if extension is None or extension.origin is None:
        return None
    script = str(Path(shape_worker.__file__))
    command = [sys.executable, "-I", "-S", script, extension.origin, str(CHILD_SECONDS), str(CHILD_BYTES)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=CHILD_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    inferred = onnx.ModelProto.FromString(done.stdout)
    return inferred if inferred.graph.node else None


def _take_over(graph: ir.Graph, inferred: onnx.GraphProto) -> None:
    """Give the graph's values, and those of graphs inside it, their inferred types and shapes."""
    known = graphs.values(graph)
    for info in (*inferred.value_info, *inferred.output):
        value = known.get(info.name)
        if value is None:
            continue
        shape = ir.serde.deserialize_type_proto_for_shape(info.type)
        kind = ir.serde.deserialize_type_proto_for_type(info.type)
        if shape is not None:
            value.shape = shape
        if kind is not None:
            value.type = kind
    for node, same in zip(graph, inferred.node, strict=True):
        for attribute in same.attribute:
            found = [attribute.g] if attribute.HasField("g") else attribute.graphs
            if found:
                for inner, typed in zip(graphs.graphs_in(node.attributes[attribute.name]), found, strict=True):
                    _take_over(inner, typed)
