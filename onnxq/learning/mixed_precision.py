"""Which width each layer gets: the least loss under a budget, when losses of layers add up.

Sources: the Pareto front by dynamic programming is that of Y. Cai et al., ZeroQ, CVPR 2020 (arXiv 2001.00281),
section 3.3; the integer program that of Z. Yao et al., HAWQ-V3, ICML 2021 (arXiv 2011.10680), equations 6 to 8. The
program is solved by HiGHS (scipy).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]
MOST_STATES = 20000  # on the front after each layer; beyond it the best of each bin of cost is kept


@dataclass(frozen=True)
class Choice:
    """One width that a layer could have.

    Attributes:
        label: What to call it, for example ``int4``.
        loss: What it costs at the output.
        costs: What it takes of each budget, by the budget's name.
    """

    label: str
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """A complete allocation.

    Attributes:
        cost: Of the budget that the front is drawn over.
        loss: The sum over the layers.
        labels: The label of each layer's choice.
    """

    cost: float
    loss: float
    labels: tuple[str, ...]


def pareto_front(layers: Sequence[Sequence[Choice]], budget: str) -> list[Point]:
    """Every allocation that none beats in both cost and loss, cheapest first.

    Layers are taken one at a time; what another state beats in both is dropped at once. With more than
    ``MOST_STATES`` of them the front is thinned to the best in each of as many bins of cost, and then close to exact.

    Args:
        layers: The choices of each layer.
        budget: The name of the cost.
    """
    costs, losses = np.zeros(1), np.zeros(1)
    steps: list[tuple[Array, Array]] = []  # for each layer: from which state, and by which choice
    for choices in layers:
        added = np.array([choice.costs[budget] for choice in choices])
        lost = np.array([choice.loss for choice in choices])
        all_costs, all_losses = (costs[:, None] + added).ravel(), (losses[:, None] + lost).ravel()
        order = np.lexsort((all_losses, all_costs))
        sorted_losses = all_losses[order]
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
        kept = order[sorted_losses < best_before]
        if len(kept) > MOST_STATES:
            kept = _thinned(kept, all_costs, all_losses)
        steps.append((kept // len(choices), kept % len(choices)))
        costs, losses = all_costs[kept], all_losses[kept]
    found = []
    for index in range(len(costs)):
        state, labels = index, []
        for choices, (sources, chosen) in zip(reversed(layers), reversed(steps), strict=True):
            labels.append(choices[chosen[state]].label)
            state = sources[state]
        found.append(Point(float(costs[index]), float(losses[index]), tuple(reversed(labels))))
    return found


def _thinned(kept: Array, costs: Array, losses: Array) -> Array:
    """The last of each bin: losses fall along the front. Both ends stay."""
    span = max(costs[kept[-1]] - costs[kept[0]], 1e-300)
    bins = ((costs[kept] - costs[kept[0]]) / span * (MOST_STATES - 2)).astype(np.int64)
    last_of_bin = np.append(bins[1:] != bins[:-1], True)
    last_of_bin[0] = True
    return np.asarray(kept[last_of_bin])


def allocate(layers: Sequence[Sequence[Choice]], budgets: Mapping[str, float]) -> Point:
    """The allocation with the least loss that keeps every budget.

    Args:
        layers: The choices of each layer.
        budgets: The most of each cost, by name.

    Raises:
        OnnxqError: even the cheapest choices are above a budget.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    for name, most in budgets.items():
        least = sum(min(choice.costs[name] for choice in choices) for choices in layers)
        if least > most * (1 + 1e-9):
            raise OnnxqError(
                f"expected a {name} budget of at least {least:.4g}, found {most:.4g}",
                hint="raise it, or allow narrower widths, for example --set weight_bits=2,3,4,8",
            )
    flat = [choice for choices in layers for choice in choices]
    owner = np.repeat(np.arange(len(layers)), [len(choices) for choices in layers])
    one_each = sparse.csr_matrix((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, most in budgets.items():
        costs = np.array([choice.costs[name] for choice in flat])
        constraints.append(LinearConstraint(costs / most, -np.inf, 1.0))  # in parts of the budget, for the tolerances
    losses = np.array([choice.loss for choice in flat])
    solved = milp(
        losses / max(float(np.abs(losses).max()), 1e-300),
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if solved.x is None:
        raise OnnxqError(
            f"expected an allocation within {', '.join(budgets)}, found none: {solved.message}",
            hint="raise a budget, or allow narrower widths, for example --set weight_bits=2,3,4,8",
        )
    taken = np.flatnonzero(solved.x > 0.5)
    first = next(iter(budgets), "")
    cost = sum(flat[index].costs.get(first, 0.0) for index in taken)
    return Point(cost, float(losses[taken].sum()), tuple(flat[index].label for index in taken))
