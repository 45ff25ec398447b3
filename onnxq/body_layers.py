"""Layers in branches and loops get codes where no range has to be calibrated for them: weights alone, or dynamic ones.

What a body computes is no value of the main graph that a session could give, so that nothing is measured there; weights
are rounded to the nearest code, with the ranges that the recipe gives the others. That is too coarse for narrow codes
with one scale for each channel, which recipes learn or correct: there they have 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxq.bodies import bodies
from onnxq.calibration.calibrate import set_weight_scales
from onnxq.calibration.weight_ranges import Search
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.lower_packed_blocks import LowerPackedBlocks
from onnxq.passes.quantize_tables import QuantizeTables
from onnxq.scheme import Scheme
from onnxq.targets import Finding, Placement, Target
from onnxq.targets.placement import excluded, within


@dataclass
class BodyLayers:
    """What gets codes inside the bodies of a model.

    Args:
        target: What will run them.
        scheme: The formats.
        exclude: Patterns of ``--exclude``.
        exceptions: The schemes of single layers, by the name of the node.

    Attributes:
        with_codes: Names of the layers inside that got codes.
        left_float: Why layers inside stay in float, by the name of the node.
        findings: What the target's lint says of what was written.
    """

    target: Target
    scheme: Scheme
    exclude: Sequence[str]
    exceptions: Mapping[str, Scheme]
    with_codes: set[str] = field(default_factory=set)
    left_float: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def count(self, model: ir.Model) -> int:
        """How many constants and activations would get codes."""
        return sum(len(self._place(inner).sites) for inner in self._open(model))

    def quantize(self, model: ir.Model, search: Search | None, *, tables: str) -> bool:
        """Give codes to every layer inside that can have them.

        Args:
            model: Changed in place.
            search: How the range of a weight follows from it (see :func:`set_weight_scales`).
            tables: The format of tables that tokens are looked up in, ``float``, ``int8`` or ``int4``.

        Returns:
            Whether a table got codes.
        """
        has_tables = False
        for inner in self._open(model):
            placement = self._place(inner)
            self.left_float |= placement.left_float
            if not placement.sites:
                continue
            self.target.prepare(inner)
            placement = self._place(inner)
            read = {node for site in placement.sites for node, _ in site.uses}
            self.with_codes |= {node.name or "" for node in read}
            InsertQDQ(placement.sites)(inner)
            set_weight_scales(inner, search)
            self.target.lower(inner)
            LowerPackedBlocks()(inner)  # whose weights may lie in the main graph, once for all branches
            if tables != "float":
                has_tables |= QuantizeTables(excluded(inner.graph, self._patterns(inner)), tables)(inner).modified
            self.findings += self.target.lint(inner)
        return has_tables

    def _open(self, model: ir.Model) -> Iterable[ir.Model]:
        is_possible = self.target.quantizes_bodies and self.scheme.weights.enabled
        return bodies(model) if is_possible and not self.scheme.activations.is_calibrated else ()

    def _place(self, inner: ir.Model) -> Placement:
        scheme = self.scheme
        if scheme.weights.format.bits < 8 and scheme.weights.block_size is None:
            scheme = replace(scheme, weights=self.target.scheme("int8", "float").weights)
        return self.target.place(inner.graph, scheme, self._patterns(inner), self.exceptions)

    def _patterns(self, inner: ir.Model) -> list[str]:
        return within(inner.graph, self.exclude)
