"""Make inputs whose statistics inside the network are those of the data that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq import graph as graphs
from onnxq.autograd.denormals import no_denormals
from onnxq.autograd.interpreter import Replacement
from onnxq.calibration import picture_size
from onnxq.calibration.data import MATCHED_RULE, InputSpec, Sample, input_specs
from onnxq.calibration.noise import as_bytes
from onnxq.errors import OnnxqError
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.progress import Progress
from onnxq.runtime import Session
from onnxq.synthesis.attention import PatchEntropy, attention_outputs, taken_apart
from onnxq.synthesis.methods import Method, get
from onnxq.synthesis.network import Network
from onnxq.synthesis.scale import picture_noise
from onnxq.synthesis.statistics import distance, pooled, remembered
from onnxq.synthesis.swing import swing
from onnxq.synthesis.terms import (
    MatchStatistics,
    PredictClasses,
    StandardInputs,
    Term,
    TotalVariation,
    layer_weights,
    slack_of,
)
from onnxq.synthesis.texture import TextureEnergy
from onnxq.synthesis.variables import Generator, JitteredPixels, Pixels, Variable

Array = np.ndarray[Any, Any]

SHARE_OF_STEPS = {"quick": 0.06, "default": 0.15, "paper": 1.0}
BATCH_ELEMENTS = 32 * 3 * 64 * 64  # pixels of one batch, at most: what is larger is made in more batches
SMALLEST_BATCH = 16
LARGE_BATCH_ELEMENTS = 16 * 3 * 224 * 224  # pixels of a smallest batch, at most: what is larger has fewer pictures yet
FEWEST = 4
LOOKED_AT = 64  # inputs that statistics are taken of, where they are only looked at
SMALL_SIDE = 64
BOUNDS = (-2.2, 2.7)  # of pixels after the usual normalisation
VARIATIONS = (2500.0, 3000.0)  # of natural images of 224², see TotalVariation
VARIATION_GROWTH = 0.13  # exponent: the same images, averaged down to 32², vary 1.3 times as much from pixel to pixel


@dataclass
class Synthesised:
    """Made inputs, as calibration data.

    Attributes:
        name: The input's name.
        inputs: [samples, channels, …].
        method: How they were made.
        distance: How far their statistics are from those remembered, in standard deviations; ``None`` where the model
            remembers none.
        noise_distance: The same of random inputs in the same units.
        entropy: Of the similarities of patches, summed over attentions, in nats; ``None`` where there are none.
        noise_entropy: The same of random inputs.
        losses: The loss after each step, by batch.
        observer: The range rule that suits them.
        told: One row of each input that follows from a picture.
    """

    name: str
    inputs: Array
    method: str
    distance: float | None
    noise_distance: float | None
    entropy: float | None
    noise_entropy: float | None
    losses: list[list[float]]
    observer: str = MATCHED_RULE
    told: Mapping[str, Array] = field(default_factory=dict)
    is_made_up: ClassVar[bool] = True

    @property
    def description(self) -> str:
        """One line that says what was made."""
        said = []
        if self.distance is not None:
            said.append(
                f"BatchNorm statistics are off by {self.distance:.2f} standard deviations, those of noise by "
                f"{self.noise_distance:.2f}"
            )
        if self.entropy is not None:
            said.append(
                f"the entropy of patch similarities is {self.entropy:.1f}, that of noise {self.noise_entropy:.1f}"
            )
        return f"made from the model itself ({self.method}); {'; '.join(said)}"

    def arrays(self) -> dict[str, Array]:
        """All inputs of the model, one row for each sample."""
        return {self.name: self.inputs} | {name: np.repeat(row[None], len(self), 0) for name, row in self.told.items()}

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Sample]:
        return ({self.name: row, **self.told} for row in self.inputs)


def can_synthesise(model: ir.Model, specs: Sequence[InputSpec], method: str) -> bool:
    """Whether the model has what a method needs: statistics or attention, and one float input of known size.

    Pictures of bytes are made as floats, and rounded. What a detector is told of its picture follows from that.
    """
    specs = picture_size.apart(specs)[0]
    if len(specs) != 1 or specs[0].is_whole or not (specs[0].dtype.kind == "f" or specs[0].holds_bytes):
        return False
    if None in specs[0].shape[1:] or len(specs[0].shape) < 3:
        return False
    return _missing(model, get(method)) is None


def default_method(model: ir.Model) -> str:
    """The method that suits a model: of those there are, the nearest to real data for its time, by SQNR."""
    return "pixels" if remembered(model) or not attention_outputs(model) else "psaq-vit"


def _missing(model: ir.Model, method: Method) -> tuple[str, str] | None:
    """What a model lacks for a method, and what to do; ``None``: nothing."""
    if method.statistics and not remembered(model):
        return (
            "BatchNormalization nodes with constant statistics, which inputs are made from",
            "export it with them (torch.onnx.export: dynamo=True, optimize=False), or give --statistics or --data",
        )
    if method.entropy and not attention_outputs(model):
        return "attention (Softmax → MatMul), whose patches are told apart", "use another --method, or give --data"
    return None


@no_denormals()
def synthesise(
    model: ir.Model,
    method: str = "pixels",
    *,
    count: int = 64,
    budget: str = "default",
    steps: int = 0,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Synthesised:
    """Make ``count`` inputs for a model.

    Args:
        model: The float model as :func:`onnxq.model.load` gives it, with its BatchNormalization nodes if it had any.
        method: Its name in :data:`onnxq.synthesis.methods.METHODS`.
        count: How many.
        budget: ``quick``, ``default`` or ``paper``: the share of the method's steps for each batch.
        steps: Steps for each batch instead.
        seed: The same seed makes the same inputs.
        device: ``cpu`` or ``cuda``.
        checkpoint: A folder for finished batches, which the caller removes when it has what it wants of them.
        progress: Where to say what is being done.

    Raises:
        OnnxqError: the model lacks what the method needs, does not run, or its input is none that can be made.
    """
    recipe, progress = get(method), progress or Progress()
    specs, following = picture_size.apart(input_specs(model))
    if missing := _missing(model, recipe):
        raise OnnxqError(f"expected {missing[0]}, found none in the model", hint=missing[1])
    if not can_synthesise(model, specs, method):
        found = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)
        raise OnnxqError(
            f"expected one float input [batch, channels, …] of known size to make, found {found}", hint="give --data"
        )
    told = picture_size.told(following, *(size or 1 for size in specs[0].sides)) if following else {}
    _check_runs(model, specs, told, device)
    with progress.stage("units", "Finding the input's units"):
        maker = _Maker(taken_apart(_reading_floats(model) if specs[0].holds_bytes else model), recipe, seed, device)
    total = steps or max(1, round(recipe.steps * SHARE_OF_STEPS[budget]))
    untouched = int(recipe.noise * count)
    sizes = _batches(count - untouched, maker.batch)
    kept = Checkpoint(checkpoint, "" if checkpoint is None else fingerprint(model, method, count, total, seed))
    made, losses = [], []
    with progress.stage("synthesise", "Making inputs", total * len(sizes), unit="steps") as advance:
        for index, size in enumerate(sizes):
            finished = kept.load(f"batch {index}")
            if finished is None:
                batch, falling = maker.make(index, size, total, advance)
                finished = {"inputs": batch, "losses": np.asarray(falling)}
                kept.save(f"batch {index}", finished)
            made.append(finished["inputs"])
            losses.append(finished["losses"].tolist())
    learned, noise = np.concatenate(made), maker.noise(count)
    inputs = np.concatenate([learned, noise[:untouched]])
    return Synthesised(
        specs[0].name,
        as_bytes(inputs) if specs[0].holds_bytes else inputs.astype(specs[0].dtype),
        method,
        maker.distance(learned),
        maker.distance(noise),
        maker.entropy(learned),
        maker.entropy(noise),
        losses,
        recipe.observer,
        told,
    )


def _reading_floats(model: ir.Model) -> ir.Model:
    """A copy whose picture is floats: what it makes of bytes has no gradient to them."""
    copy = model.clone()
    for value in graphs.values(copy.graph).values():
        if value.dtype == ir.DataType.UINT8 and not value.is_initializer():
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: copies share theirs
    return copy


def _check_runs(model: ir.Model, specs: Sequence[InputSpec], told: Mapping[str, Array], device: str) -> None:
    """Refuse a model that does not run before minutes go into inputs for it."""
    feed = {spec.name: np.zeros([size or 1 for size in spec.shape], spec.dtype) for spec in specs}
    feed |= {name: np.repeat(row[None], specs[0].shape[0] or 1, axis=0) for name, row in told.items()}
    Session(model, optimize=False, device=device).run(feed)


def _normal(shape: Sequence[int], source: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=source)


def _batches(count: int, size: int) -> list[int]:
    """Batches of nearly one size, none of them larger than ``size``."""
    number = -(-count // size)
    return [count // number + (index < count % number) for index in range(number)]


class _Maker:
    """A network that inputs are made for by one method."""

    def __init__(self, model: ir.Model, recipe: Method, seed: int, device: str) -> None:
        self.network, self.model, self.seed = Network(model, seed, device, picture=recipe.picture), model, seed
        small = len(self.network.shape) == 3 and max(self.network.shape[1:]) < SMALL_SIDE
        self.recipe = recipe = replace(recipe, **recipe.small) if small else recipe  # type: ignore[arg-type]
        self.shape, self.layers, self.graph = self.network.shape, self.network.layers, self.network.graph
        self.attention = PatchEntropy(attention_outputs(model))
        self.logits = self.network.logits if recipe.classes else None
        wanted = [layer.value for layer in self.layers] if recipe.statistics or recipe.slack else []
        wanted += self.attention.outputs if recipe.entropy else []
        wanted += [self.logits] if self.logits is not None else []
        self.taps = list(dict.fromkeys(wanted))
        elements = int(np.prod(self.shape))
        smallest = min(SMALLEST_BATCH, max(FEWEST, LARGE_BATCH_ELEMENTS // elements))
        largest = max(smallest, BATCH_ELEMENTS // elements)
        self.batch = min(recipe.batch or len(self.layers), largest)

    @no_denormals()
    def make(self, index: int, size: int, steps: int, advance: Callable[[int], None]) -> tuple[Array, list[float]]:
        """One batch, and the loss after each step."""
        source = torch.Generator().manual_seed(self.seed * 100_003 + index + 1)
        variable, terms = self._variable(size, steps, source), self._terms(size, index * self.batch, source)
        replaced: Mapping[str, Replacement] = swing(self.graph, self.model, source) if self.recipe.swing else {}
        losses = []
        for step in range(steps):
            variable.zero_grad()
            inputs = variable.inputs()
            taps = self.graph.run(self.network.given(inputs), self.taps, replaced=replaced)
            loss = torch.stack([weight * term(inputs, taps) for weight, term in terms]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            variable.step(loss.detach())
            losses.append(float(loss.detach()))
            advance(index * steps + step + 1)
        with torch.no_grad():
            return self.network.array(variable.made()), losses

    def noise(self, count: int) -> Array:
        """Normal inputs in the network's units."""
        source = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            return self.network.array(torch.randn(count, *self.shape, generator=source).to(self.graph.device))

    def distance(self, inputs: Array) -> float | None:
        """How far some inputs are from what is remembered."""
        if not self.layers:
            return None
        return distance(self._pooled(inputs), self.layers)

    def entropy(self, inputs: Array) -> float | None:
        """The entropy of patch similarities of some inputs, in nats."""
        if not self.recipe.entropy:
            return None
        total, samples = 0.0, 0
        for size, taps in self._look(inputs, self.attention.outputs):
            total += size * sum(float(item) for item in self.attention.entropies(taps, size))
            samples += size
        return total / samples

    def _pooled(self, inputs: Array) -> list[tuple[Tensor, Tensor]]:
        return pooled((taps for _, taps in self._look(inputs, [layer.value for layer in self.layers])), self.layers)

    def _look(self, inputs: Array, values: Sequence[str]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """How many inputs there are in each batch of the first ones, and what they give."""
        for first in range(0, min(len(inputs), LOOKED_AT), self.batch):
            rows = torch.from_numpy(inputs[first : min(first + self.batch, LOOKED_AT)].astype(np.float32))
            with torch.no_grad():
                yield len(rows), self.graph.run({self.network.input: rows.to(self.graph.device)}, values)

    def _variable(self, size: int, steps: int, source: torch.Generator) -> Variable:
        device = str(self.graph.device)
        if self.recipe.generator and len(self.shape) == 3 and min(self.shape[1:]) >= 4:
            channels, height, width = self.shape
            return Generator(size, (channels, height, width), source, steps=steps, device=device)
        draw = picture_noise if self.recipe.picture else _normal
        start = draw((size, *self.shape), source).to(device)
        if self.recipe.jitter:
            return JitteredPixels(start, self.recipe.rate, steps, BOUNDS, source)
        return Pixels(start, self.recipe.rate, max(5, steps // 5), self.network.bounds)

    def _terms(self, size: int, first: int, source: torch.Generator) -> list[tuple[float, Term]]:
        """What is minimised, with weights."""
        recipe, terms = self.recipe, list[tuple[float, Term]]()
        if recipe.statistics:
            terms.append((1.0, self._match(first, source)))
        if recipe.standard:
            terms.append((1.0, StandardInputs(recipe.per_sample or recipe.generator)))
        if recipe.entropy:
            terms.append((recipe.entropy, self.attention))
        if recipe.classes and self.logits is not None:
            labels = self._labels(first, size).to(self.graph.device)
            terms.append((recipe.classes, PredictClasses(self.logits, labels, recipe.difficulty)))
        if recipe.texture:
            terms.append((recipe.texture, TextureEnergy()))
        if recipe.variation and len(self.shape) == 3:
            low, high = VARIATIONS
            wanted = low + (high - low) * float(torch.rand(1, generator=source))
            wanted *= (224 / min(self.shape[1:])) ** VARIATION_GROWTH
            terms.append((recipe.variation, TotalVariation(wanted)))
        return terms

    def _labels(self, first: int, size: int) -> Tensor:
        """All classes in turn, in an order that is drawn."""
        classes = self.network.classes()
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(self.seed))
        return order[(first + torch.arange(size)) % classes]

    def _match(self, first: int, source: torch.Generator) -> MatchStatistics:
        slack = []
        if self.recipe.slack:
            noise = torch.randn(LOOKED_AT, *self.shape, generator=source).to(self.graph.device)
            slack = slack_of(self._pooled(self.network.array(noise)), self.layers, self.recipe.slack)
        return MatchStatistics(
            self.layers,
            self.recipe.per_sample,
            self.recipe.mean_of_channels,
            slack,
            self.recipe.emphasis,
            first,
            () if self.recipe.layers is None else layer_weights(len(self.layers), *self.recipe.layers),
            self.recipe.variances,
        )
