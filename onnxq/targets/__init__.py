"""Targets: what runs the quantized model. Each knows its own rules; recipes do not mention them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import onnx_ir as ir

from onnxq.errors import OnnxqError
from onnxq.kinds import Kind
from onnxq.scheme import DYNAMIC, Scheme
from onnxq.targets.findings import Finding
from onnxq.targets.placement import Placement, Site

__all__ = ["Finding", "Placement", "Site", "Target", "get", "names"]


class Target(Protocol):
    """Placement, legality, lowering and lint of one runtime."""

    name: str
    packs_codes: bool  # whether it reads 4-bit constants that are no operand of DequantizeLinear
    quantizes_attention: bool  # whether products of two activations get codes
    quantizes_bodies: bool  # whether layers in branches and loops run on codes
    multiplies_one_matrix: bool  # whether kernels know no scales for each of several matrices
    computes_in_half: bool  # whether there are kernels from float16 and bfloat16 to codes

    def scheme(self, weights: str | None, activations: str | None) -> Scheme:
        """The scheme for the formats asked for (the target's own defaults where ``None``), or an error."""

    def prepare(self, model: ir.Model) -> None:
        """Rewrites that keep the function and let this target's kernels match."""

    def place(
        self,
        graph: ir.Graph,
        scheme: Scheme,
        exclude: Sequence[str] = (),
        exceptions: Mapping[str, Scheme] = MappingProxyType({}),
    ) -> Placement:
        """Where Q/DQ go; ``exceptions`` are the schemes of single layers, by the name of the node."""

    def lower(self, model: ir.Model) -> None:
        """The last step after calibration: the form that the target runs."""

    def lint(self, model: ir.Model, sm: int | None = None) -> list[Finding]:
        """Every rule of the target that the graph breaks."""


def scheme_of_ends(target: Target, scheme: Scheme, text: str) -> Scheme:
    """What the first and the last layers get if they are to have the format ``text``.

    Raises:
        OnnxqError: the target has no kernel for it.
    """
    if text == "float":
        return target.scheme("float", "float")
    if scheme.activations.dynamic:
        return target.scheme(text, DYNAMIC)
    return target.scheme(text, None if scheme.activations.enabled else "float")


def embeddings_format(target: Target, scheme: Scheme, kind: Kind, asked: str | None) -> str:
    """What tables of tokens are stored in, ``int8``, ``int4`` or ``float``.

    If nothing was asked for, bytes on a CPU where weights are codes too and the model reads text, or chooses its ranges
    while it runs. Other models' tables, of steps or classes, are small, and count for more than their size.

    Raises:
        OnnxqError: the target has no use for codes there.
    """
    if asked in ("int8", "int4") and target.name != "cpu":
        raise OnnxqError(
            f"expected embeddings in float for {target.name}, found {asked}: an engine holds its tables as floats",
            hint="leave --embeddings out, or use --target cpu",
        )
    reads_text = kind is Kind.LANGUAGE or scheme.activations.dynamic
    pays = target.name == "cpu" and scheme.weights.enabled and reads_text
    return asked or ("int8" if pays else "float")


def experts_format(target: Target, scheme: Scheme) -> str:
    """What weights of experts are stored in that a router chooses among: ``int8``, ``int4`` or ``float``."""
    if target.name != "cpu" or not scheme.weights.enabled:
        return "float"
    return "int4" if scheme.weights.format.bits <= 4 else "int8"


def check_packed(target: Target, scheme: Scheme) -> None:
    """Refuse ``--packed-blocks`` where no product could be written so.

    Raises:
        OnnxqError: the target is not the CPU, or weights have no blocks.
    """
    if target.name != "cpu":
        raise OnnxqError(
            f"expected --target cpu beside --packed-blocks, found {target.name}: MatMulNBits is onnxruntime's own",
            hint="leave --packed-blocks out: TensorRT reads blocks behind DequantizeLinear",
        )
    if scheme.weights.granularity != "block":
        raise OnnxqError(
            f"expected weights in blocks beside --packed-blocks, found {scheme.weights}",
            hint="use --weights int4:32, or --recipe int4-weights",
        )


def names() -> list[str]:
    """The targets there are."""
    return ["tensorrt", "cpu"]


def get(name: str) -> Target:
    """The target of that name."""
    if name == "tensorrt":
        from onnxq.targets.tensorrt import TensorRT

        return TensorRT()
    if name == "cpu":
        from onnxq.targets.cpu import Cpu

        return Cpu()
    raise OnnxqError(f"expected a target of {', '.join(names())}, found {name!r}", hint="use --target tensorrt or cpu")
