"""Which sampler steps of which trajectories become calibration inputs: a table of samples and steps.

Every policy gives a boolean array [samples, steps]; step 0 is the noisiest. A trajectory costs one run of the
network a step, whatever is kept of it, so that ``all`` is the cheapest for each input and ``ndtc`` the dearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.calibration.data import Array
from onnxq.errors import OnnxqError

POLICIES = ("uniform", "all", "ndtc")


def select(policy: str, samples: int, timesteps: Sequence[float], kept: int, seed: int) -> Array:
    """The inputs to keep.

    Args:
        policy: ``uniform``: ``kept`` evenly spaced steps of each trajectory, staggered from one to the next, so that
            all steps get their share; ``all``; ``ndtc``: steps drawn from a normal distribution (:func:`ndtc`).
        samples: Trajectories.
        timesteps: What the network is told at each step.
        kept: Steps of each trajectory that are kept.
        seed: For what is drawn.

    Returns:
        A boolean array [samples, steps].

    Raises:
        OnnxqError: there is no such policy, or there are fewer steps than shall be kept.
    """
    steps = len(timesteps)
    if policy not in POLICIES:
        raise OnnxqError(
            f"expected a selection of {', '.join(POLICIES)}, found {policy!r}", hint="use --select uniform"
        )
    if not 1 <= kept <= steps:
        raise OnnxqError(
            f"expected to keep between 1 and {steps} steps of each trajectory, found {kept}",
            hint="choose more --steps, or keep fewer",
        )
    if policy == "all":
        return np.ones((samples, steps), bool)
    if policy == "uniform":
        chosen = np.zeros((samples, steps), bool)
        for sample in range(samples):
            offset = sample * steps // samples  # the first trajectory starts at step 0, the others in between
            chosen[sample, (np.arange(kept) * steps // kept + offset) % steps] = True
        return chosen
    return ndtc(samples, timesteps, kept, seed)


def by_influence(influence: Array, samples: int, kept: int, seed: int) -> Array:
    """Half of the inputs evenly spread over the steps, half where an error moves the images most.

    Where the first step counts most, it gets inputs from trajectories of its own, which stop there: the network runs
    in no step longer than it would for ``samples`` whole trajectories.

    Args:
        influence: Of each step (:func:`onnxq.diffusion.influence.image_influence`) [steps].
        samples: Trajectories that are run to the end.
        kept: Inputs for each of them.
        seed: As for :func:`select`.

    Returns:
        A boolean array [samples or more, steps].
    """
    steps = len(influence)
    even = select("uniform", samples, range(steps), kept - kept // 2, seed)
    most = samples * steps // np.arange(1, steps + 1)  # rows that cost no more than all trajectories do
    share = influence / influence.sum()
    counts = np.minimum(even.sum(axis=0) + np.floor(samples * (kept // 2) * share).astype(int), most)
    while counts.sum() < samples * kept:
        counts[np.argmin(np.where(counts < most, counts, np.iinfo(counts.dtype).max))] += 1
    chosen = np.zeros((max(samples, int(counts.max())), steps), bool)
    chosen[:samples] = even
    for step, count in enumerate(counts):
        chosen[np.flatnonzero(~chosen[:, step])[: count - int(even[:, step].sum())], step] = True
    return chosen


def ndtc(
    samples: int,
    timesteps: Sequence[float],
    kept: int = 1,
    seed: int = 0,
    *,
    mean: float = 0.4,
    deviation: float = 0.4,
    clamp: bool = True,
) -> Array:
    """Normally distributed timesteps: t ~ N(mean T, (deviation T)²), each moved to the nearest scheduled step.

    Source: Y. Shang, Z. Yuan, B. Xie, B. Wu, Y. Yan, Post-training Quantization on Diffusion Models, CVPR 2023
    (arXiv 2211.15736), section 3.3. The paper's text has the deviation sqrt(T/2), its code 0.4 T, which is taken
    here. Its code also feeds the input of step T-1-t with timestep t; here every input keeps its own timestep.

    Args:
        samples: Trajectories.
        timesteps: What the network is told at each step; the largest is T.
        kept: Draws for each trajectory (1 in the paper); draws that fall on one step count once.
        seed: For the draws.
        mean: As part of T.
        deviation: As part of T.
        clamp: Whether draws outside [0, T] are moved to its ends (the paper), or drawn again.

    Returns:
        A boolean array [samples, steps].
    """
    generator = np.random.default_rng([seed, 4])
    times = np.asarray(timesteps, np.float64)
    times = 1 - times if times[0] < times[-1] else times / max(times.max(), 1)  # the share of noise, 1 at the start
    draws = generator.normal(mean, deviation, (samples, kept))
    while not clamp and (outside := (draws < 0) | (draws > 1)).any():
        draws[outside] = generator.normal(mean, deviation, int(outside.sum()))
    draws = np.clip(draws, 0, 1)
    order = np.argsort(times, kind="stable")
    nearest = order[np.searchsorted((times[order][1:] + times[order][:-1]) / 2, draws)]
    chosen = np.zeros((samples, len(times)), bool)
    np.put_along_axis(chosen, nearest, True, axis=1)
    return chosen


class ActiveSelection:
    """Steps picked while something is learned from them: where it is least decided, and where it was least.

    Score of step t: what is undecided there, plus bonus / (visits + 1); the highest is next, the noisiest among equals.

    Source: C. Wang et al., Towards Accurate Post-training Quantization for Diffusion Models, CVPR 2024 (arXiv
    2305.18723): structural risk minimisation, with the entropy of the choice of groups as the empirical risk and the
    bonus as a bound on how far the picked steps are from all.

    Args:
        available: Which steps have samples [steps].
        bonus: Weight of the second term; 1.5 in the paper.

    Attributes:
        visits: How often each step was picked [steps].
    """

    def __init__(self, available: Array, bonus: float = 1.5) -> None:
        self.available, self.bonus = np.asarray(available, bool), bonus
        self.visits = np.zeros(len(self.available), np.int64)

    def pick(self, undecided: Array) -> int:
        """The next step.

        Args:
            undecided: Entropy of what is learned, by step [steps].
        """
        score = np.where(self.available, undecided + self.bonus / (self.visits + 1), -np.inf)
        step = int(np.argmax(score))
        self.visits[step] += 1
        return step
