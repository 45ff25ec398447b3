"""Load a model from a file, bring it to the one form the passes expect, and save it whole or not at all.

The form: functions inlined, constants lifted to initializers and folded, initializers not listed as inputs,
opset 21 or later, every value and node named, shapes inferred; what depends on plugins is set aside until the model
is saved. BatchNormalization is left alone, because synthesis reads its statistics.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.passes import Sequential

from onnxq import constant_folding, constant_regions, identities, layer_nodes, plugins, shapes
from onnxq import graph as graphs
from onnxq.errors import OnnxqError
from onnxq.passes.expand_einsum import ExpandEinsum
from onnxq.passes.expand_fusions import ExpandFusions, claim_simplified_norms
from onnxq.passes.free_invariants import FreeInvariants
from onnxq.passes.match_types import MatchTypes
from onnxq.serialized import IN_MEMORY_LIMIT_BYTES
from onnxq.writing import atomic_folder

OLDEST_OPSET = 7
LOWEST_OPSET = 21  # the first with int4, block scales and output_dtype
WITHOUT_WEIGHTS_BYTES = 64 << 20  # a file that is larger holds its weights itself
EXTERNAL_DATA_LIMIT_BYTES = (
    256 << 20
)  # far below the 2 GiB of protobuf: data in a file of its own is mapped, not copied
SMALL_TENSOR_BYTES = 1 << 12
METADATA_PREFIX = "onnxq."
DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file and normalise it. Weights stay memory-mapped where they lie outside the file.

    Raises:
        OnnxqError: the file is missing, empty, truncated or not ONNX; its opset is below 7; its graph is
            cyclic or invalid; or its external data is missing or lies outside the model's folder.
    """
    model = read(path)
    normalise(model, name=Path(path).name)
    return model


def read(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file as it is, with the checks of :func:`load` on the file itself; plugins get their own domain."""
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "nothing"
        raise OnnxqError(f"expected an ONNX file at {file}, found {found}", hint="check the path")
    if file.suffix == ".json":
        raise OnnxqError(
            f"expected an ONNX model, found JSON: {file}",
            hint="of a .groups.json, take a graph that it names; compare, lint, build and sample take it whole",
        )
    if file.stat().st_size == 0:
        raise OnnxqError(f"expected an ONNX model, found an empty file: {file}", hint="export the model again")
    try:
        with quiet():
            model = ir.load(file)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if "Map types" in _one_line(error):
            raise OnnxqError(
                f"expected tensors in {file}, found a map, as ZipMap makes it",
                hint="export the model without it: skl2onnx takes options={'zipmap': False}",
            ) from error
        raise OnnxqError(
            f"expected an ONNX model in {file}, found something that does not parse ({_one_line(error)})",
            hint="the file is truncated or not ONNX; copy or export it again",
        ) from error
    if not model.graph.opset_imports or len(model.graph) == 0:
        raise OnnxqError(
            f"expected an ONNX model with at least one node in {file}, found none",
            hint="the file is truncated, not ONNX, or an empty graph",
        )
    _check_external_data(model, file)
    _check_tensors(model, file)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes < SMALL_TENSOR_BYTES:
            _take_in(value)  # shapes and axes, which checker and shape inference must see
    plugins.claim(model)
    return model


def normalise(model: ir.Model, *, name: str = "the model") -> None:
    """Bring ``model`` to the project's form, in place. Does nothing to a model that is in it already."""
    opset = model.graph.opset_imports.get("")
    if opset is None or opset < OLDEST_OPSET:
        raise OnnxqError(
            f"expected opset {OLDEST_OPSET} or later in {name}, found {opset or 'no ONNX opset at all'}",
            hint="export the model again with a newer opset (21 is best)",
        )
    try:
        with quiet():
            _normalise(model, opset, name)
    except OnnxqError:
        raise
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise OnnxqError(
            f"expected a valid graph in {name}, found one that cannot be brought to opset {LOWEST_OPSET} "
            f"({_one_line(error)})",
            hint="run `python -m onnx.checker` or load it in onnxruntime to see what is wrong, then export it again",
        ) from error


def check_valid(model: ir.Model, name: str) -> None:
    """Refuse a graph that the ONNX checker refuses.

    Raises:
        OnnxqError: it does.
    """
    try:
        with quiet():
            common_passes.CheckerPass()(model)
    except MemoryError:
        raise
    except Exception as error:
        raise OnnxqError(
            f"expected a valid graph in {name}, found one that is not ({_one_line(error)})",
            hint="run `python -m onnx.checker` to see what is wrong, then make the file again",
        ) from error


def _normalise(model: ir.Model, opset: int, name: str) -> None:
    shapes.free_negative(model)
    Sequential(
        common_passes.InlinePass(),
        common_passes.RemoveInitializersFromInputsPass(),
        common_passes.TopologicalSortPass(),
        common_passes.NameFixPass(),
    )(model)
    claim_simplified_norms(model)  # which the checker does not know
    shapes.infer(model)  # outputs may come without a type
    shapes.check_sizes(model, name)
    # So that every pass may take for granted what an op requires; what a plugin makes may come without a shape.
    common_passes.CheckerPass()(plugins.without_plugins(model))
    _name_nodes(model)
    if opset < LOWEST_OPSET:
        from onnxscript import version_converter

        version_converter.convert_version(model, LOWEST_OPSET, fallback=True)
        reached = model.graph.opset_imports[""]
        if reached < LOWEST_OPSET:
            raise OnnxqError(
                f"expected a model that converts to opset {LOWEST_OPSET}, found an op that stays at opset {reached}",
                hint=f"export the model again with opset {LOWEST_OPSET}",
            )
    ExpandFusions()(model)
    model.ir_version = max(model.ir_version or 0, 10)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    FreeInvariants()(model)
    ExpandEinsum()(model)
    constant_folding.fold(model)
    constant_regions.compute(model)
    identities.eliminate(model)
    common_passes.RemoveUnusedNodesPass()(model)
    MatchTypes()(model)
    shapes.infer(model)
    shapes.check_sizes(model, name)
    common_passes.NameFixPass()(model)
    _name_nodes(model)
    plugins.set_aside(model)
    if not graphs.tensor_outputs(model.graph):
        raise OnnxqError(
            f"expected an output that is a tensor in {name}, found none that is (sequences, say)",
            hint="make a tensor of what the sequence holds an output too, which results are judged by",
        )


def _name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own: lint, engine proofs and ``--exclude`` speak of nodes by name."""
    nodes = [node for graph in model.graphs() for node in graph]
    taken = {node.name for node in nodes if node.name}
    for index, node in enumerate(nodes):
        if not node.name:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def save(model: ir.Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
    """Write ``model`` to ``path`` whole or not at all; large weights go to ``path`` + ``.data`` beside it.

    Args:
        model: The model; plugins that were set aside when it was loaded are put back.
        path: Where the ``.onnx`` file goes.
        external_data: Whether weights go to a file of their own; ``None``: only where protobuf needs it.

    Returns:
        The path written.

    Raises:
        OnnxqError: the folder does not exist or cannot be written, or the disk is full.
    """
    file = Path(path)
    plugins.put_back(model)
    if external_data is None:
        external_data = initializer_bytes(model) > EXTERNAL_DATA_LIMIT_BYTES
    data_name = f"{file.name}.data"
    if not external_data:  # data outside the file that was read would be looked for beside the new one
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _take_in(value)
    with atomic_folder(file) as folder:
        ir.save(model, folder / file.name, external_data=data_name if external_data else None)
        if external_data:
            os.replace(folder / data_name, file.parent / data_name)
        os.replace(folder / file.name, file)
    return file


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, without reading them."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the external data files that it names."""
    return bytes_of_files([path])


def bytes_of_files(paths: Iterable[str | os.PathLike[str]]) -> int:
    """Bytes of several model files and of the external data files that they name; what they share counts once."""
    files: set[Path] = set()
    for path in map(Path, paths):
        with quiet():
            model = ir.load(path)
        files |= {path, *(path.parent / tensor.location for tensor in _external_tensors(model))}
    return sum(file.stat().st_size for file in files)


def is_large(path: str | os.PathLike[str]) -> bool:
    """Whether a file's weights are too many for one onnxruntime session (see :class:`onnxq.runtime.Session`)."""
    size = Path(path).stat().st_size
    return size > IN_MEMORY_LIMIT_BYTES or (size <= WITHOUT_WEIGHTS_BYTES and file_bytes(path) > IN_MEMORY_LIMIT_BYTES)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _take_in(value: ir.Value) -> None:
    """Make an initializer outside the model's file one inside."""
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _check_external_data(model: ir.Model, file: Path) -> None:
    folder = file.resolve().parent
    for tensor in _external_tensors(model):
        location = Path(os.fsdecode(tensor.location).replace("\0", "\N{REPLACEMENT CHARACTER}"))  # in no path
        resolved = (folder / location).resolve()
        if location.is_absolute() or not resolved.is_relative_to(folder):
            raise OnnxqError(
                f"expected external data beside {file.name}, found a path that leaves its folder: "
                f"{tensor.location!r} (tensor {tensor.name!r})",
                hint="save the model again with its data beside it; such paths are not followed",
            )
        if not resolved.is_file():
            raise OnnxqError(
                f"expected the external data of {file.name} at {resolved}, found nothing (tensor {tensor.name!r})",
                hint="copy the data file beside the model",
            )
        try:
            end = (tensor.offset or 0) + tensor.nbytes
        except TypeError as error:
            raise OnnxqError(
                f"expected numbers outside {file.name}, found a tensor of type {tensor.dtype} ({tensor.name!r})",
                hint="the file is damaged; copy or export it again",
            ) from error
        if not 0 <= (tensor.offset or 0) <= end <= resolved.stat().st_size:
            raise OnnxqError(
                f"expected bytes {tensor.offset or 0} to {end} in {resolved}, found {resolved.stat().st_size} "
                f"(tensor {tensor.name!r})",
                hint="the data file is truncated; copy it again",
            )


def _check_tensors(model: ir.Model, file: Path) -> None:
    """Refuse a tensor whose bytes are not what its shape and type say."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        try:
            if isinstance(tensor, ir.TensorProtoTensor) and tensor.size and not _has_data(tensor.raw):
                raise ValueError("none at all")  # the library reads zeros
            if tensor.dtype.bitwidth < 8:
                tensor.tobytes()  # as an array it would be unpacked
            else:
                tensor.numpy()  # looks at the bytes where they lie; only the rare lists of numbers are copied
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            raise OnnxqError(
                f"expected as many bytes in tensor {name!r} of {file.name} as its shape and type say, found others "
                f"({_one_line(error)})",
                hint="the file is damaged; copy or export it again",
            ) from error


def _has_data(tensor: Any) -> bool:
    """Whether a tensor in onnx's own form holds any number."""
    return any(len(getattr(tensor, field)) for field in DATA_FIELDS)


def check_float(model: ir.Model) -> None:
    """Refuse a model that is quantized already, with Q/DQ, integer kernels, or by onnxq in any other form.

    Raises:
        OnnxqError: it is.
    """
    found = next(
        (
            f"node {node.name!r}, {node.op_type}"
            for node in model.graph.all_nodes()
            if node.op_type in graphs.QDQ
            or node.op_type in layer_nodes.QUANTIZED_OPS  # onnxruntime has a Q/DQ of its own
        ),
        f"by onnxq, recipe {get_metadata(model)['recipe']}" if "recipe" in get_metadata(model) else None,
    )
    if found is not None:
        raise OnnxqError(
            f"expected a float model, found one that is quantized already ({found})",
            hint="give the float model that it was made from; `onnxq strip` makes one of a quantized model",
        )


def set_metadata(model: ir.Model, **entries: str) -> None:
    """Write what onnxq must remember into the model's metadata, under ``onnxq.``."""
    for key, text in entries.items():
        model.metadata_props[METADATA_PREFIX + key] = text


def get_metadata(model: ir.Model) -> dict[str, str]:
    """What :func:`set_metadata` wrote."""
    return {
        key.removeprefix(METADATA_PREFIX): text
        for key, text in model.metadata_props.items()
        if key.startswith(METADATA_PREFIX)
    }


def drop_metadata(model: ir.Model, *keys: str) -> None:
    """Take entries of :func:`set_metadata` out again, where they are."""
    for key in keys:
        model.metadata_props.pop(METADATA_PREFIX + key, None)


def _one_line(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:  # the passes wrap what went wrong; the innermost says it
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    return text[:200] or type(cause).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The graph libraries log their fallbacks; a user cannot do anything about them."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
