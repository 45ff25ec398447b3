"""A model in the form that sessions are made of: its large initializers apart, and inner values as further outputs."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxq import condensed as condensing
from onnxq import dynamic_fp4
from onnxq import graph as graphs
from onnxq.passes.emulate_bfloat16 import EmulateBfloat16
from onnxq.passes.repeat_draws import RepeatDraws
from onnxq.plugins import without_plugins

Array = np.ndarray[Any, Any]

LARGE_TENSOR_BYTES = 1 << 20  # kept out of the serialised model, which protobuf limits to 2 GiB
IN_MEMORY_LIMIT_BYTES = 1 << 29


@dataclass(frozen=True)
class Serialized:
    """A model that a session can be made of (see :func:`serialize`).

    Attributes:
        model: The model.
        large: The initializers that are not in it, by name.
        appended: How many of its outputs, at the end, are taps, or results of such.
        folder: Where initializers lie that are in neither: ``model`` names their files, relative to it.
        weight_bytes: Of all initializers, as float32: literal runs unpack codes, all of them before the first layer.
        emulates_bfloat16: Whether it computes bfloat16 in float32, which takes longer than either.
        condensed: Taps that are outputs in condensed form, the names of these, and the axes of their means.
    """

    model: onnx.ModelProto
    large: dict[str, Array]
    appended: int
    folder: str = ""
    weight_bytes: int = 0
    emulates_bfloat16: bool = False
    condensed: dict[str, tuple[list[str], list[int]]] = field(default_factory=dict)

    @property
    def is_large(self) -> bool:
        """Whether it runs in parts, because a session would hold copies of all its weights."""
        return self.weight_bytes > IN_MEMORY_LIMIT_BYTES


def serialize(
    model: ir.Model,
    taps: Sequence[str] = (),
    *,
    by_path: bool = True,
    condense: Collection[str] = (),
    means: bool = False,
) -> Serialized:
    """The model with ``taps`` as further outputs, and the large initializers left out of it.

    Models below 512 MiB keep everything inside but what lies outside their file. Larger ones leave out all large
    initializers, which the caller hands to onnxruntime as (memory-mapped) arrays.

    Args:
        model: The model.
        taps: Names of inner values that become its last outputs.
        by_path: Whether what lies in files beside the model is named by its path, so that onnxruntime maps it by
            itself and nothing is copied; ``False`` where another process or machine reads the result.
        condense: Taps that are reduced in the graph, of which a run then returns :class:`Condensed` ones.
        means: Whether means of channels are wanted of condensed taps too.
    """
    model = without_plugins(model)
    narrow, draws = graphs.is_bfloat16(model), graphs.draws_at_random(model)
    model = model.clone() if condense or narrow or draws else model
    if draws:
        RepeatDraws()(model)
    if narrow:
        EmulateBfloat16()(model)
    graph = model.graph
    own = {value.name for value in graph.outputs}
    known = graphs.values(graph) if taps else {}
    further = {name: [known[name]] for name in taps if name not in own}
    condensed: dict[str, tuple[list[str], list[int]]] = {}
    if condense:
        taken = [known[name] for name in further if name in condense and condensing.can_be_condensed(known[name])]
        for name, (results, axes) in condensing.condense(graph, taken, means).items():
            further[name] = results
            condensed[name] = [value.name or "" for value in results], axes
    wanted = [value for values in further.values() for value in values]
    graph.outputs.extend(wanted)
    large: dict[str, Array] = {}
    kept: dict[str, ir.TensorProtocol] = {}
    try:
        tensors = {name: value.const_value for name, value in graph.initializers.items()}
        present = [tensor for tensor in tensors.values() if tensor is not None]
        weight_bytes = sum(max(tensor.nbytes, 4 * tensor.size) for tensor in present)
        too_large = weight_bytes > IN_MEMORY_LIMIT_BYTES
        folder = _folder_of_most(tensors.values()) if by_path else ""
        for name, tensor in tensors.items():
            # Elsewhere a path to external data means nothing, so that such tensors come along in any case.
            is_external = isinstance(tensor, ir.ExternalTensor)
            is_float4 = tensor is not None and tensor.dtype == ir.DataType.FLOAT4E2M1
            if tensor is None or not (is_external or is_float4 or (too_large and tensor.nbytes >= LARGE_TENSOR_BYTES)):
                continue
            shown: ir.TensorProtocol = _as_float8(tensor) if is_float4 else tensor
            if not is_external and shown.dtype.bitwidth < 8:  # as an array it would be unpacked
                continue
            if folder and isinstance(shown, ir.ExternalTensor) and str(shown.base_dir) == folder:
                continue
            kept[name] = tensor
            if shown.nbytes < LARGE_TENSOR_BYTES:
                inner: ir.TensorProtocol = ir.Tensor(shown.numpy(), dtype=shown.dtype, name=name)
            else:
                large[name] = np.ascontiguousarray(shown.numpy())  # a folded Transpose is a view: refused as it is
                shape = ir.Shape(large[name].shape)
                inner = ir.ExternalTensor(
                    "in-memory", 0, shown.nbytes, shown.dtype, shape=shape, name=name, base_dir=""
                )
            graph.initializers[name].const_value = inner
        proto = ir.to_proto(model)
        dynamic_fp4.for_onnxruntime(proto)
    finally:
        for name, tensor in kept.items():
            graph.initializers[name].const_value = tensor
        if wanted:
            for _ in wanted:
                graph.outputs.pop()  # one by one: deleting a slice would leave the values marked as outputs
    place = folder and str(Path(folder).resolve())
    return Serialized(proto, large, len(wanted), place, weight_bytes, narrow, condensed)


def _as_float8(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """FP4 codes as FP8 ones, which hold all 16 numbers: onnxruntime has no FP4, and this means the same."""
    return ir.tensor(tensor.numpy().astype(ml_dtypes.float8_e4m3fn), name=tensor.name)


def _folder_of_most(tensors: Iterable[ir.TensorProtocol | None]) -> str:
    """The folder that most of the tensors that lie in files lie in; empty where none does."""
    folders = collections.Counter(str(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    return max(folders, key=lambda folder: folders[folder]) if folders else ""
