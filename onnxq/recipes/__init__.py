"""Recipes: one paper, one file. This is their registry; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from onnxq.errors import OnnxqError

if TYPE_CHECKING:
    from onnxq.job import Job


@dataclass(frozen=True)
class Entry:
    """A recipe by name: where it is, and what it brings unless the user says otherwise.

    Attributes:
        module: The file in this folder.
        attribute: The recipe's class in it.
        line: What it does, in one line.
        weights: The format of weights; ``None`` leaves it to the target.
        activations: The format of activations; ``None`` leaves it to the target.
        knobs: Defaults that differ from those of the class.
        target: The only target that has kernels for it; ``None`` where there are several.
    """

    module: str
    attribute: str
    line: str
    weights: str | None = None
    activations: str | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None

    def load(self) -> type[Recipe]:
        """The recipe's class."""
        try:
            found: type[Recipe] = getattr(importlib.import_module(f"onnxq.recipes.{self.module}"), self.attribute)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise OnnxqError(
                "expected torch for a recipe that learns, found it not installed",
                hint="pip install 'onnxq[learn]' (any build of torch; the CPU one does)",
            ) from error
        return found


RECIPES: dict[str, Entry] = {
    "int8": Entry("static", "Static", "8-bit integers from streamed statistics (the default)"),
    "int8-minmax": Entry("static", "Static", "the same with the widest ranges", knobs={"observer": "minmax"}),
    "int8-dynamic": Entry(
        "static",
        "Static",
        "8-bit integers, ranges of activations found while the model runs (cpu); no data",
        "int8",
        "dynamic",
        {"bias_correction": False, "step_floor_db": 0.0},
        target="cpu",
    ),
    "fp8": Entry("static", "Static", "FP8 E4M3 weights and activations (TensorRT, SM 89)", "fp8", "fp8"),
    "int4-weights": Entry(
        "static", "Static", "int4 weights in blocks, float activations", "int4:128", "float", {"weight_ranges": "few"}
    ),
    "fp4": Entry(
        "static",
        "Static",
        "FP4 weights and activations in blocks (NVFP4, SM 100), FP8 where there is no FP4 kernel",
        "fp4",
        "fp4",
        {"observer": "minmax", "weight_ranges": "few"},
    ),
    "fp4-weights": Entry(
        "static", "Static", "FP4 weights in blocks, float activations", "fp4", "float", {"weight_ranges": "few"}
    ),
    "adaround": Entry("adaround", "AdaRound", "rounding learned layer by layer"),
    "brecq": Entry("brecq", "Brecq", "rounding and activation steps learned block by block"),
    "qdrop": Entry("qdrop", "QDrop", "the same, with quantization dropped at random while it learns"),
    "lsq": Entry("lsq", "Lsq", "weights and steps fine-tuned after the float network, block by block or end to end"),
    "mixed": Entry("mixed", "Mixed", "a width for each layer, the least loss within a budget of bits or MiB"),
    "gptq": Entry("gptq", "Gptq", "int4 weights, rounding errors taken up column by column", "int4", "float"),
    "smoothquant": Entry("smoothquant", "SmoothQuant", "outliers of activations moved into weights, then 8 bits"),
    "awq": Entry("awq", "Awq", "int4 weights in blocks, scaled by what they are multiplied with", "int4:128", "float"),
    "rex": Entry("rex", "Rex", "weights as a sum of codes: their rounding error is quantized too; no data", "int4"),
    "powerquant": Entry("powerquant", "PowerQuant", "weights on a searched power grid; no data", "int4", "float"),
    "pnmq": Entry("pnmq", "Pnmq", "weights on power grids, widths for a target compression; no data", "int4", "float"),
    "zeroq": Entry("zeroq", "ZeroQ", "no data: ranges, and widths within a budget, from distilled inputs"),
    "dsg": Entry("dsg", "Dsg", "no data: ranges from distilled inputs that are kept apart"),
    "genie": Entry("genie", "Genie", "no data: blocks learned on images from a generator", knobs={"observer": "mse"}),
    "psaq-vit": Entry("psaq_vit", "PsaqVit", "no data: ranges of vision transformers from images of unlike patches"),
    "gdfq": Entry("gdfq", "Gdfq", "no data: fine-tuned on images from a generator that learns beside"),
    "zaq": Entry("zaq", "Zaq", "no data: fine-tuned where a generator finds that the networks disagree"),
    "adadfq": Entry("adadfq", "AdaDfq", "no data: the same, disagreement kept within bounds"),
    "hast": Entry("hast", "Hast", "no data: fine-tuned on hard images, made harder while the student learns"),
    "texq": Entry("texq", "TexQ", "no data: fine-tuned on a generator's images, led by classes' rich textures"),
    "ptq4dm": Entry("ptq4dm", "Ptq4dm", "denoisers: static scales from steps drawn along the sampler"),
    "q-diffusion": Entry("q_diffusion", "QDiffusion", "denoisers: blocks learned on inputs from all steps"),
    "tfmq-dm": Entry("tfmq_dm", "TfmqDm", "denoisers: what depends on time alone is learned, or tabulated, apart"),
    "apq-dm": Entry("apq_dm", "ApqDm", "denoisers: steps in groups that share scales; the groups are searched for"),
    "q-dm": Entry("q_dm", "QDm", "denoisers: trained to predict what the float one does, activations of one range"),
    "ptqd": Entry("ptqd", "Ptqd", "denoisers: the error of each step measured and taken back, over another recipe"),
    "diffusion": Entry("diffusion", "Diffusion", "denoisers: our composition of what pays, learned block by block"),
    "zeroquant": Entry("zeroquant", "ZeroQuant", "transformers: activations token by token, layers distilled"),
    "norm-tweaking": Entry(
        "norm_tweaking",
        "NormTweaking",
        "int4 weights in blocks, norms adjusted to them",
        "int4:128",
        "float",
    ),
    "multiquant": Entry("multiquant", "MultiQuant", "an int8 model from which every width is exported", "int8"),
}

DEFAULT = "int8"


class Recipe(Protocol):
    """A frozen dataclass of knobs with one method that reads like the paper's algorithm."""

    def run(self, job: Job) -> None:
        """Quantize ``job.model`` in place."""


def canonical(name: str) -> str:
    """The name under which a recipe is listed: ``default`` is another name of the first."""
    return DEFAULT if name == "default" else name


def get(name: str) -> Entry:
    """The recipe of that name.

    Raises:
        OnnxqError: there is no such recipe.
    """
    if canonical(name) not in RECIPES:
        raise OnnxqError(
            f"expected a recipe of {', '.join(RECIPES)}, found {name!r}",
            hint="`onnxq recipes` lists them with their papers",
        )
    return RECIPES[canonical(name)]
