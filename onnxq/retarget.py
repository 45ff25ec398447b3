"""Bring a Q/DQ model of any tool to the form that a target runs, with the ranges that it has."""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxq import graph as graphs
from onnxq import layer_nodes, targets
from onnxq import model as models
from onnxq.bodies import bodies
from onnxq.calibration import calibrate, observers
from onnxq.errors import CheckError, OnnxqError
from onnxq.passes.insert_qdq import FORMAT, SIGNED_SCALES, InsertQDQ
from onnxq.passes.lower_packed_blocks import LowerPackedBlocks
from onnxq.passes.quantize_tables import QuantizeTables
from onnxq.passes.strip_qdq import StoredWeight, StripQDQ
from onnxq.scheme import DYNAMIC, Scheme
from onnxq.targets import Finding, Placement, Site, Target


@dataclass(frozen=True)
class Retargeted:
    """A model in the form of another target.

    Attributes:
        model: The model; :func:`onnxq.save` writes it.
        quantized_nodes: Names of the layers that run on codes.
        left_float: Why the other layers with weights are float, by the name of the node.
        lost_ranges: Whether activations had codes whose ranges the model found while it ran, and have none here.
    """

    model: ir.Model
    quantized_nodes: list[str]
    left_float: dict[str, str]
    lost_ranges: bool = False


def strip(path: str | os.PathLike[str]) -> ir.Model:
    """The float model under a quantized model: stored codes become the numbers they mean.

    Raises:
        OnnxqError: there is no Q/DQ in it, or something else than Q/DQ.
    """
    model = models.load(path)
    written_by_onnxq = "recipe" in models.get_metadata(model)  # loading makes floats of its tables
    modified = [StripQDQ()(part).modified for part in itertools.chain([model], bodies(model))]
    if not any(modified) and not written_by_onnxq:
        raise _nothing(path)
    models.drop_metadata(model, "version", "recipe", "target", "seed", "config", "knobs")
    return model


def retarget(path: str | os.PathLike[str], target: str) -> Retargeted:
    """Take the Q/DQ pairs out and put them back where ``target`` wants them.

    Ranges and weight scales are those of the file: an unsigned or shifted range becomes the symmetric one around it
    where the target knows no other, a bias becomes float, weight scales run along output channels. Layers that had
    no range on an input stay float.

    Raises:
        OnnxqError: there is no Q/DQ in the model, or something else than Q/DQ.
        CheckError: the result still breaks a rule of the target.
    """
    model = models.load(path)
    runtime = targets.get(target)
    if runtime.quantizes_bodies:
        parts = [_bring(model, runtime), *(_bring(inner, runtime, is_body=True) for inner in bodies(model))]
    else:  # whose rewrites of the main graph refuse codes anywhere
        parts = [*map(_only_strip, bodies(model)), _bring(model, runtime)]
    if not any(part.had_codes for part in parts):
        raise _nothing(path)
    names = [name for part in parts for name in part.quantized_nodes]
    if not any(part.has_sites for part in parts):
        raise OnnxqError(
            f"expected layers that {target} can run on codes, found none in {os.fspath(path)}",
            hint="quantize the float model instead: onnxq quantize",
        )
    findings = [*runtime.lint(model), *(item for part in parts for item in part.findings)]
    errors = [item for item in findings if item.severity == "error"]
    if errors:
        raise CheckError(
            f"expected a graph that passes the lint of {target}, found {len(errors)} errors, first: "
            f"{errors[0].rule} at {errors[0].node!r}: {errors[0].message}",
            hint="quantize the float model instead: onnxq quantize",
        )
    left_float = {name: reason for part in parts for name, reason in part.left_float.items() if name not in names}
    return Retargeted(model, names, left_float, any(part.lost_ranges for part in parts))


@dataclass
class _Part:
    """What became of the main graph, or of the body of a branch or a loop."""

    had_codes: bool = False
    has_sites: bool = False
    quantized_nodes: list[str] = field(default_factory=list)
    left_float: dict[str, str] = field(default_factory=dict)
    lost_ranges: bool = False
    findings: list[Finding] = field(default_factory=list)


def _only_strip(model: ir.Model) -> _Part:
    stripped = StripQDQ()
    return _Part(stripped(model).modified, lost_ranges=stripped.is_dynamic)


def _bring(model: ir.Model, target: Target, *, is_body: bool = False) -> _Part:
    stripped = StripQDQ()
    part = _Part(stripped(model).modified)
    if not part.had_codes:
        return part
    target.prepare(model)
    scheme = _scheme(target, stripped)
    placement = _place(model.graph, target, scheme, stripped)
    part.has_sites = bool(placement.sites)
    InsertQDQ(placement.sites)(model)
    calibrate.set_activation_scales(model, _statistics(stripped), observers.minmax)
    calibrate.set_weight_scales(model)
    _keep_weight_scales(model.graph, stripped.weights)
    part.quantized_nodes = [
        item.node.name or ""
        for item in layer_nodes.weighted_nodes(model.graph)
        if any(graphs.is_dequantized(value) for value in item.node.inputs[:2])
    ]
    part.left_float = placement.left_float
    target.lower(model)
    if stripped.has_tables and target.name == "cpu":
        QuantizeTables()(model)  # bytes, which hold also what 4 bits with zero points meant
    if is_body:  # the main graph is looked at when all are done
        LowerPackedBlocks()(model)
        part.findings = target.lint(model)
    part.lost_ranges = stripped.is_dynamic and not scheme.activations.enabled
    return part


def _nothing(path: str | os.PathLike[str]) -> OnnxqError:
    return OnnxqError(
        f"expected a model with QuantizeLinear and DequantizeLinear, found none in {os.fspath(path)}",
        hint="a float model is quantized with `onnxq quantize`",
    )


def _scheme(target: Target, stripped: StripQDQ) -> Scheme:
    """The formats that most weights have, on this target."""
    kinds = Counter((weight.storage.name, weight.block_size) for weight in stripped.weights.values())
    storage, block_size = kinds.most_common(1)[0][0] if kinds else ("INT8", 0)
    unsigned = "uint4" if target.name == "cpu" and block_size else "int4"  # no other kernel has zero points of weights
    name = {"INT4": "int4", "UINT4": unsigned, "FLOAT8E4M3FN": "fp8"}.get(storage, "int8")
    weights = f"{name}:{block_size}" if block_size else name
    if stripped.ranges:
        return target.scheme(weights, None)
    return target.scheme(weights, DYNAMIC if stripped.is_dynamic and target.name == "cpu" else "float")


def _place(graph: ir.Graph, target: Target, scheme: Scheme, stripped: StripQDQ) -> Placement:
    """The target's placement, without what has no range: layers that lose an input that way stay float."""
    reasons: dict[str, str] = {}
    while True:
        placement = target.place(graph, scheme, [glob.escape(name) for name in reasons])
        found: dict[str, str] = {}
        sites = []
        for site in placement.sites:
            if not _is_missing(site, stripped):
                sites.append(site)
            for node, _ in site.uses if sites[-1:] != [site] else ():
                found[node.name or ""] = "the file has no range for one of its inputs"
        if not found.keys() - reasons.keys():
            return Placement(sites, placement.left_float | reasons)
        reasons |= found


def _is_missing(site: Site, stripped: StripQDQ) -> bool:
    if site.spec.dynamic:
        return False
    name = (site.like or site.value).name or ""
    return name not in (stripped.weights if graphs.is_constant(site.value) else stripped.ranges)


def _statistics(stripped: StripQDQ) -> dict[str, observers.Statistics]:
    found = {}
    for name, (low, high) in stripped.ranges.items():
        found[name] = observers.Statistics()
        found[name].low, found[name].high = low, high
    return found


def _keep_weight_scales(graph: ir.Graph, weights: dict[str, StoredWeight]) -> None:
    """Write the file's own scales where they fit, so that the codes stay the same."""
    for node in graph:
        source = node.inputs[0] if graphs.is_quantize(node) else None
        stored = None if source is None or not graphs.is_constant(source) else weights.get(source.name or "")
        scale = node.inputs[1] if stored is not None else None
        if stored is None or scale is None or scale.const_value is None:
            continue
        if not (stored.symmetric or node.metadata_props[FORMAT] == stored.storage.name.lower() == "uint4"):
            continue
        if source is None or source.const_value is not stored.tensor:
            continue  # something was folded into it since
        same_kind = stored.storage.name.lower() == node.metadata_props[FORMAT].replace("fp8", "float8e4m3fn")
        same_axis = not stored.scale.ndim or stored.axis == node.attributes.get_int("axis", 1)
        if same_kind and same_axis and stored.scale.shape == scale.const_value.numpy().shape:
            zero_point = np.broadcast_to(stored.zero_point, stored.scale.shape)
            # A block's scale below zero, which lets its largest number have the code -8, has no kernel in TensorRT: 7
            # for that one number costs less than another grid for all.
            steps = stored.scale if SIGNED_SCALES in node.metadata_props else np.abs(stored.scale)
            calibrate.write_scales(node, steps, zero_point)
