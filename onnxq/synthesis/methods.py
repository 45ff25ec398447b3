"""The ways to make inputs from a model: what is changed, and which terms are minimised. One declaration each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxq.calibration.data import MATCHED_RULE
from onnxq.errors import OnnxqError


@dataclass(frozen=True)
class Method:
    """A way to make inputs.

    Attributes:
        line: What it does, with its source.
        generator: Whether a generator with learned latent codes makes the inputs; otherwise pixels are learned.
        rate: Adam's rate of pixels.
        steps: Steps for each batch, with ``--budget paper``.
        batch: Inputs that are made together; 0: one for each BatchNormalization.
        per_sample: Whether every sample has to match statistics by itself.
        mean_of_channels: Mean instead of sum over the channels of a layer.
        variances: Whether variances are matched, and not standard deviations, which are smaller where layers are loud.
        slack: The quantile of what random inputs are off that is free; 0: nothing is.
        emphasis: How much more each sample gives to a layer of its own.
        swing: Whether strided convolutions read shifted inputs.
        statistics: Whether statistics are matched at all.
        entropy: Weight of the entropy of patch similarities; above 0 it needs a transformer.
        classes: Weight of the prediction of classes that are drawn.
        difficulty: The power of a sample's difficulty that weighs the prediction of its class (HAST).
        variation: Weight of the distance to the variation of natural images.
        texture: Weight of the texture elements that are too strong or too weak (TexQ).
        layers: Weights of the shallow and of the deep half of the layers, whose statistics are then averaged.
        standard: Whether inputs are held to mean 0 and deviation 1 in the units of the first layer.
        small: What differs for images below 64 pixels a side.
        jitter: Whether pixels are seen through random shifts and flips.
        noise: The part of the inputs that stays noise, at the end: it reaches what made images leave out.
        picture: Whether pixels start with the spectrum of pictures, and not white, and stay between black and white.
        observer: The range rule that suits the inputs. Made ones have lighter tails than real data: a clip at what
            they seldom reach would cut off what real data needs.
    """

    line: str
    generator: bool = False
    rate: float = 0.5
    steps: int = 500
    batch: int = 32
    per_sample: bool = True
    mean_of_channels: bool = False
    variances: bool = False
    slack: float = 0.0
    emphasis: float = 0.0
    swing: bool = False
    statistics: bool = True
    entropy: float = 0.0
    classes: float = 0.0
    difficulty: float = 0.0
    variation: float = 0.0
    texture: float = 0.0
    layers: tuple[float, float] | None = None
    standard: bool = True
    small: Mapping[str, float] = field(default_factory=dict)
    jitter: bool = False
    noise: float = 0.0
    picture: bool = False
    observer: str = MATCHED_RULE


METHODS = {
    "zeroq": Method("pixels that match BatchNorm statistics sample by sample (ZeroQ, arXiv 2001.00281)"),
    "dsg": Method(
        "the same with slack, and a layer of its own for each sample (DSG, arXiv 2103.01049)",
        batch=0,
        slack=0.9,
        emphasis=1.0,
    ),
    "pixels": Method(
        "pixels whose batch matches BatchNorm statistics as a whole",
        rate=0.1,
        per_sample=False,
        mean_of_channels=True,
        picture=True,
    ),
    "genie": Method(
        "a generator and its codes, learned for each batch, with swing convolutions (GENIE-D, arXiv 2212.04780)",
        generator=True,
        steps=4000,
        batch=128,
        per_sample=False,
        mean_of_channels=True,
        swing=True,
    ),
    "hast": Method(
        "pixels of drawn classes, hard ones weighing more, that match statistics as a batch (HAST, arXiv 2303.13826)",
        steps=1000,
        batch=256,
        per_sample=False,
        mean_of_channels=True,
        variances=True,
        layers=(1.0, 1.0),
        classes=0.1,
        difficulty=0.5,
        standard=False,
        small={"classes": 10.0, "difficulty": 2.0},
    ),
    "texq": Method(
        "pixels of drawn classes, loose in shallow and tight in deep layers, of rich texture (TexQ, NeurIPS 2023)",
        rate=0.05,
        steps=1500,
        batch=256,
        per_sample=False,
        mean_of_channels=True,
        layers=(0.2, 1.1),
        classes=5.0,
        texture=1.0,
        standard=False,
    ),
    "psaq-vit": Method(
        "images whose patches a transformer tells apart; needs no BatchNorm (PSAQ-ViT, arXiv 2203.02250)",
        rate=0.2,
        steps=1000,
        per_sample=False,
        statistics=False,
        entropy=1.0,
        classes=1.0,
        variation=0.05,
        jitter=True,
        noise=1 / 3,
        observer="robust",
    ),
}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        OnnxqError: there is none.
    """
    if name not in METHODS:
        raise OnnxqError(
            f"expected a way to make inputs of {', '.join(METHODS)}, found {name!r}",
            hint="`onnxq synthesize --help` explains them",
        )
    return METHODS[name]
