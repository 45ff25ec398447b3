"""What a schedule's file may say, checked: entries of ours, and those of diffusers' that are read here too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from onnxq.diffusion.flow_sigmas import Rule
from onnxq.errors import OnnxqError, unwanted

EMPIRICAL_TOKENS = 4300  # of a sample: above, FLUX.2's shift does not depend on steps
MOST_TIMESTEPS = 1_000_000  # of a schedule: each has a row in its tables


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise ValueError("[low, high] is needed")
    return pair


Interval = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
Count = Annotated[int, Field(ge=1, le=MOST_TIMESTEPS)]


class Entries(BaseModel):
    """Some of a file's entries; others are let through, and ``null`` is what is not there."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """The entries of a file.

        Raises:
            OnnxqError: one is not what it has to be.
        """
        try:
            return cls(**{key: value for key, value in config.items() if value is not None})
        except ValidationError as error:
            raise OnnxqError(
                f"expected {unwanted(error)} in the schedule", hint="correct the scheduler's file"
            ) from error


class OwnEntries(Entries):
    """What diffusers' schedulers know nothing of (see :mod:`onnxq.diffusion.schedule`)."""

    num_inference_steps: Count | None = None
    guidance_interval: Interval = (-np.inf, np.inf)
    data_range: Interval = (-1.0, 1.0)
    use_clipped_model_output: bool = True
    eta: float = Field(default=0.0, ge=0, le=1)
    network_time: Literal["timestep", "noise", "data"] = "timestep"
    negated: bool | None = None
    sigmas: Rule = "scheduler"
    mu: FiniteFloat | None = None
    mu_rule: Literal["line", "root", "empirical"] = "line"

    @property
    def sign(self) -> int:
        """What a prediction is multiplied with before the scheduler's step."""
        negated = self.network_time == "data" if self.negated is None else self.negated
        return -1 if negated else 1


class SchedulerEntries(Entries):
    """Entries of diffusers' own; the numbers of the shift are FLUX's where they are not given."""

    prediction_type: str | None = None
    num_train_timesteps: Count = 1000
    use_flow_sigmas: bool = False
    use_dynamic_shifting: bool = False
    base_image_seq_len: FiniteFloat = 256
    base_shift: FiniteFloat = 0.5
    max_image_seq_len: FiniteFloat = 4096
    max_shift: FiniteFloat = 1.15

    @model_validator(mode="after")
    def _two_sizes(self) -> Self:
        few, many = self.base_image_seq_len, self.max_image_seq_len
        if few >= many:
            raise ValueError(f"base_image_seq_len below max_image_seq_len is needed, found {few:g} and {many:g}")
        return self

    def mu(self, rule: str, tokens: int, steps: int) -> float:
        """The shift of a sample of so many tokens.

        Args:
            rule: ``line``: it grows evenly between two sizes; ``root``: with the root of the sample's size (CogView4);
                ``empirical``: see :func:`empirical_mu`.
            tokens: Of the sample.
            steps: Of the sampler.

        Source: P. Esser et al., Scaling Rectified Flow Transformers, ICML 2024 (arXiv 2403.03206), section 5.3.2, as
        diffusers' pipelines interpolate it; the root, ``CogView4Pipeline``.
        """
        if rule == "empirical":
            return empirical_mu(tokens, steps)
        if rule == "root":
            return self.base_shift + self.max_shift * math.sqrt(tokens / self.base_image_seq_len)
        part = (tokens - self.base_image_seq_len) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + (self.max_shift - self.base_shift) * part


def empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's shift of a sample: two lines in its tokens, for 10 and for 200 steps, and between them in the steps.

    Source: the numbers are those of diffusers' ``Flux2Pipeline``. Large samples have the line of many steps alone.
    """
    (slope_10, offset_10), (slope_200, offset_200) = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
    many = slope_200 * tokens + offset_200
    if tokens > EMPIRICAL_TOKENS:
        return many
    few = slope_10 * tokens + offset_10
    return many + (many - few) * (steps - 200) / 190
