"""The main job: from a float ONNX file to a checked, quantized one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import onnxq
from onnxq import custom_ops, kinds, layer_nodes, older_opset, plugins, recipes, targets
from onnxq import graph as graphs
from onnxq import model as models
from onnxq.calibration import observers, side_car, sizes, weight_ranges
from onnxq.calibration.data import Source
from onnxq.calibration.noise import Noise
from onnxq.check import Check, bare_float_run, check
from onnxq.config import WITHOUT_EFFECT, Settings, build_knobs, make_settings
from onnxq.diffusion import subgraphs
from onnxq.diffusion.subgraphs import Subgraph
from onnxq.errors import OnnxqError
from onnxq.inputs import calibration_inputs
from onnxq.job import Job, peak_rss_mib, quantized_counts
from onnxq.parallel import open_workers
from onnxq.passes import lower_opset
from onnxq.passes.insert_qdq import FORMAT, STATISTICS
from onnxq.progress import Progress
from onnxq.recipes import Recipe
from onnxq.targets.placement import EXCLUDED
from onnxq.writing import check_writable

Array = np.ndarray[Any, Any]
LOW_SQNR_DB = 10.0


@dataclass(repr=False)
class Result:
    """A quantized model and what it cost.

    Attributes:
        model: The quantized model; :func:`onnxq.save` writes it.
        settings: Everything that the recipe was told.
        numbers: The keys of ``--json`` (see the documentation of ``onnxq quantize``).
        tensors: Range and histogram of each quantized activation, for the report.
        subgraphs: A denoiser's graphs for groups of steps, where the recipe was told to make them.
    """

    model: ir.Model
    settings: Settings
    numbers: dict[str, Any]
    tensors: list[dict[str, Any]] = field(default_factory=list)
    subgraphs: list[Subgraph] = field(default_factory=list)

    def __repr__(self) -> str:
        """The closing table in plain lines: a model of thousands of nodes would fill a notebook."""
        from onnxq.report.metrics import json_safe
        from onnxq.report.table import plain_lines

        return "\n".join(plain_lines(json_safe(self.numbers)))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model, whole or not at all, with a graph for each group of steps where there are such."""
        return subgraphs.save(self.model, self.subgraphs, path)


def quantize(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Quantize an ONNX model.

    Args:
        model: Path of the float model.
        data: Calibration inputs: an ``.npz`` keyed by input name, a folder of images or npz files, or any iterable
            of dicts of batched arrays. ``None``: they are made from the model itself (BatchNorm statistics, patches, a
            denoiser's sampler, written text); random ones where nothing tells more, which is said in the warnings.
        output: Where to write the result; ``None`` writes nothing.
        settings: A :class:`Settings`; or give its fields as keywords: ``recipe``, ``target``, ``weights``,
            ``activations``, ``first_last``, ``embeddings``, ``packed_blocks``, ``opset``, ``base``, ``rotate``,
            ``low_rank``, ``samples``, ``shapes``, ``exclude``, ``only``, ``seed``, ``device``, ``custom_ops``,
            ``workers``, ``ray``, ``synthesis``, ``statistics``, ``budget``, ``knobs``, ``preprocess``;
            for a denoiser without data ``scheduler``, ``steps``, ``guidance``, ``conditions``.
        progress: Where to say what is being done; by default nowhere.
        **options: The fields of :class:`Settings`.

    Returns:
        The result; its model has passed the lint of its target and a run in onnxruntime.

    Raises:
        OnnxqError: the model, the data or a setting is not what was expected.
    """
    started = time.perf_counter()
    settings = settings or make_settings(options)
    progress = progress or Progress()
    path = Path(model)
    custom_ops.use(settings.custom_ops)
    if output is not None:
        check_writable(Path(output))
    entry = recipes.get(settings.recipe)
    if entry.target is not None and "target" not in settings.model_fields_set:
        settings = settings.model_copy(update={"target": entry.target})
    target = targets.get(settings.target)
    scheme = target.scheme(settings.weights or entry.weights, settings.activations or entry.activations)
    if settings.packed_blocks:
        targets.check_packed(target, scheme)
    recipe = build_knobs(entry.load(), {**entry.knobs, **settings.knobs}, settings.recipe)
    for knob, look_up in (("observer", observers.get), ("weight_ranges", weight_ranges.get)):
        if hasattr(recipe, knob):  # an unknown rule is refused before inputs are made for it
            look_up(getattr(recipe, knob))
    with progress.stage("load", "Loading"):
        loaded = models.load(path)
        models.check_float(loaded)
        if settings.opset is not None:
            lower_opset.check_formats(scheme, settings.opset)
            lower_opset.LowerOpset(settings.opset, required=True)(loaded.clone())  # or it says so before it begins
        sizes.choose(loaded, settings.shapes)
        kind = kinds.kind_of(loaded)  # of the float graph: what is rewritten for a target is harder to tell
        embeddings = targets.embeddings_format(target, scheme, kind, settings.embeddings)
        if settings.statistics is not None:
            side_car.attach(loaded, Path(settings.statistics))
    learns: bool = settings.low_rank > 0 or any(
        hasattr(recipe, knob) for knob in ("samples", "sensitivity_samples", "images")
    )
    learns |= getattr(recipe, "reads_data", False)
    reads_data = scheme.activations.is_calibrated or learns or getattr(recipe, "bias_correction", False)
    kept = None if output is None else checkpoint_folder(Path(output), "inputs")
    source = None
    try:
        with open_workers(settings.workers, settings.ray) as workers:
            source, warnings = calibration_inputs(
                loaded,
                path,
                data,
                settings,
                progress,
                recipe,
                judged_only=not reads_data,
                checkpoint=kept,
                workers=workers,
            )
            recipe = _with_range_rule(recipe, source, {**entry.knobs, **settings.knobs})
            with progress.stage("load", "Loading"):
                job = Job(loaded, target, scheme, settings, source, progress, warnings=warnings, path=path)
                job.embeddings = embeddings
                job.checkpoint, job.workers = None if output is None else checkpoint_folder(Path(output)), workers
            recipe.run(job)
        checked = check(job)
    except OnnxqError as error:
        if source is None and data is None and not reads_data:
            error.hint += "; one sample is enough, which the result is judged by"
        if kept is not None:  # made inputs are kept for a run that goes on, not for a model that is refused
            shutil.rmtree(kept, ignore_errors=True)
        raise
    numbers = _numbers(job, path, checked, recipe, kind)
    if settings.opset is not None:
        older_opset.write_at(job, settings.opset)
    models.set_metadata(
        loaded,
        version=onnxq.__version__,
        recipe=recipes.canonical(settings.recipe),
        target=settings.target,
        seed=str(settings.seed),
        config=json.dumps(settings.model_dump(exclude_defaults=True, exclude=WITHOUT_EFFECT), sort_keys=True),
        knobs=json.dumps(numbers["knobs"], sort_keys=True),
    )
    plugins.put_back(loaded)
    loaded.producer_name, loaded.producer_version = "onnxq", onnxq.__version__
    if output is not None:
        with progress.stage("save", "Saving"):
            subgraphs.save(loaded, job.subgraphs, output)
        for folder in (checkpoint_folder(Path(output)), checkpoint_folder(Path(output), "inputs")):
            shutil.rmtree(folder, ignore_errors=True)
        numbers["output"] = str(output)
        if job.subgraphs:
            numbers["subgraphs"] = str(subgraphs.index_path(output))
        numbers["quantized_bytes"] = models.file_bytes(output)
    else:
        numbers["quantized_bytes"] = models.initializer_bytes(loaded)
    numbers["seconds"] = {"total": time.perf_counter() - started, **progress.seconds}
    numbers["peak_rss_mib"] = peak_rss_mib()
    try:
        numbers |= bare_float_run(job, path, checked)
    except OnnxqError as error:  # in a part that loading dropped: the result is none the worse
        numbers["warnings"].append(f"the float model itself was not timed: {error.message}")
    return Result(loaded, settings, numbers, _tensors(job), job.subgraphs)


def checkpoint_folder(output: Path, of: str = "checkpoint") -> Path:
    """Where finished steps are kept until the output is written: blocks that a recipe learns, or made ``inputs``."""
    return output.parent / f".{output.name}.{of}"


def _with_range_rule(recipe: Recipe, source: Source, given: Mapping[str, Any]) -> Recipe:
    """The recipe with the range rule that suits the samples, unless the user or the recipe names another one."""
    rule = getattr(source, "observer", None)
    if rule is None or "observer" in given or getattr(recipe, "observer", None) != observers.DEFAULT:
        return recipe
    changed: Recipe = dataclasses.replace(recipe, observer=rule)  # type: ignore[type-var]
    return changed


def _numbers(job: Job, path: Path, checked: Check, recipe: Any, kind: kinds.Kind) -> dict[str, Any]:
    quantized, weighted = quantized_counts(job.model.graph)
    warnings = list(job.warnings)
    left_float = {} if job.placement is None else job.placement.left_float
    beyond = list(layer_nodes.layers_without_codes(job.model.graph))
    weighted += len(beyond)
    aside = plugins.aside(job.model)
    behind = [] if aside is None else list(layer_nodes.weighted_nodes(aside.graph))
    weighted += len(behind)
    if aside is not None and behind:
        warnings.append(
            f"{len(behind)} of {weighted} layers stay float: they stand behind {aside.spelled()}, which onnxruntime "
            "does not know"
        )
    unasked = [(name, left_float.get(name, reason)) for name, reason in beyond if left_float.get(name) != EXCLUDED]
    if unasked:
        warnings.append(f"{len(unasked)} of {weighted} layers stay float; {unasked[0][0]}: {unasked[0][1]}")
    if checked.sqnr_db < LOW_SQNR_DB:
        worst = min(checked.outputs.items(), key=lambda item: item[1], default=None)
        which = "the output's error" if worst is None else f"the error of output {worst[0]!r}"
        ratio = checked.sqnr_db if worst is None else worst[1]
        warnings.append(f"{which} is large: SQNR {ratio:.1f} dB against the float model")
    return {
        "model": str(path),
        "recipe": recipes.canonical(job.settings.recipe),
        "knobs": {key: value for key, value in vars(recipe).items()},
        "target": job.target.name,
        "weights": str(job.scheme.weights),
        "activations": str(job.scheme.activations),
        "first_last": job.settings.first_last,
        "seed": job.settings.seed,
        "kind": kind.value,
        "quantized_nodes": quantized,
        "weighted_nodes": weighted,
        "left_float": left_float,
        "integer_kernels": checked.integer_kernels,
        "optimized_nodes": checked.optimized_nodes,
        "float_bytes": models.file_bytes(path),
        "sqnr_db": checked.sqnr_db,
        **({"outputs": checked.outputs} if checked.outputs else {}),
        **({"step_sqnr_db": job.step_sqnr_db} if job.step_sqnr_db else {}),
        **job.measurements,
        "samples": job.recording.samples if job.recording else 0,
        "samples_from": getattr(job.source, "description", ""),
        "layers": checked.layers,
        **({"plugins": aside.plugins} if aside is not None else {}),
        "warnings": warnings,
        "next_steps": _next_steps(job, checked),
    }


def _next_steps(job: Job, checked: Check) -> list[str]:
    steps = []
    if isinstance(job.source, Noise):
        steps.append("give real inputs with --data (an .npz keyed by input name, or a folder of images)")
    # What only moves data has nothing to keep; an LSTM is there once for each of its outputs.
    computing = [layer for layer in checked.layers if layer["op"] not in graphs.DATA_MOVEMENT]
    worst = list(dict.fromkeys(layer["name"] for layer in computing if layer["sqnr_db"] < 15))[:3]
    if worst and checked.sqnr_db < 25:
        patterns = " ".join(f"--exclude '{name}'" for name in worst)
        steps.append(f"keep the worst layers in float: {patterns}")
    observer = job.settings.knobs.get("observer")
    if checked.sqnr_db < 20 and recipes.canonical(job.settings.recipe) == recipes.DEFAULT and observer is None:
        steps.append("try another range rule: --set observer=mse, or minmax, or percentile")
    if job.target.name == "tensorrt":
        steps.append("compile it and see which layers run in INT8: onnxq build")
    return steps


def _tensors(job: Job) -> list[dict[str, Any]]:
    """What the report draws of each activation: its histogram and where it is clipped."""
    if job.recording is None:
        return []
    quantizers = [node for node in job.model.graph if {FORMAT, STATISTICS} <= set(node.metadata_props)]
    formats = {node.metadata_props[STATISTICS]: node.metadata_props[FORMAT] for node in quantizers}
    tensors = []
    for name, chosen in job.ranges.items():
        statistics = job.recording.statistics[name]
        edges, counts = statistics.drawing()
        tensors.append(
            {
                "name": name,
                "low": statistics.low,
                "high": statistics.high,
                "clip_low": chosen.low,
                "clip_high": chosen.high,
                "format": formats.get(name, job.scheme.activations.format.name),
                "histogram": {"edges": edges, "counts": counts},
            }
        )
    return tensors
