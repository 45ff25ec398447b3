"""Whether two models take the same inputs and give the same outputs, and are therefore versions of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxq.calibration.data import InputSpec, input_specs
from onnxq.errors import OnnxqError


def common_inputs(original: ir.Model, quantized: ir.Model) -> list[InputSpec]:
    """The inputs of both models; an axis that one of them fixes is fixed."""
    expected = input_specs(original)
    found = {spec.name: spec for spec in input_specs(quantized)}
    _check_names("inputs", [spec.name for spec in expected], list(found))
    common = []
    for spec in expected:
        other = found[spec.name]
        if spec.dtype != other.dtype:
            raise OnnxqError(
                f"expected input {spec.name!r} to be {spec.dtype} in both models, found {other.dtype} "
                "in the quantized one",
                hint="quantize with float inputs and outputs, or compare models of one interface",
            )
        _check_shapes("input", spec.name, spec.shape, other.shape)
        fixed = tuple(a if a is not None else b for a, b in zip(spec.shape, other.shape, strict=True))
        common.append(replace(spec, shape=fixed))
    return common


def check_outputs(original: ir.Model, quantized: ir.Model) -> None:
    """Refuse two models that do not answer in the same names and shapes."""
    expected = {value.name or "": value for value in original.graph.outputs}
    found = {value.name or "": value for value in quantized.graph.outputs}
    _check_names("outputs", list(expected), list(found))
    for name, value in expected.items():
        if value.shape is not None and found[name].shape is not None:
            _check_shapes("output", name, _dimensions(value), _dimensions(found[name]))


def _dimensions(value: ir.Value) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape or ())


def _check_names(kind: str, expected: Sequence[str], found: Sequence[str]) -> None:
    if set(expected) != set(found):
        raise OnnxqError(
            f"expected the same {kind} in both models, found {', '.join(expected)} in the float one "
            f"and {', '.join(found)} in the quantized one",
            hint="compare a quantized model with the float model that it was made from",
        )


def _check_shapes(kind: str, name: str, expected: Sequence[int | None], found: Sequence[int | None]) -> None:
    same = len(expected) == len(found) and all(
        a is None or b is None or a == b for a, b in zip(expected, found, strict=True)
    )
    if not same:
        shapes = [["any" if size is None else size for size in shape] for shape in (expected, found)]
        raise OnnxqError(
            f"expected {kind} {name!r} to have the shape {shapes[0]} of the float model, found {shapes[1]}",
            hint="compare a quantized model with the float model that it was made from",
        )
