"""Mixed precision: each layer gets the width it needs, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnxq import recipes
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.observers import Observer
from onnxq.calibration.weight_ranges import Search
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning.mixed_precision import Choice, Point, allocate, pareto_front
from onnxq.learning.smoothing import level
from onnxq.learning.speedup import FLOAT, Race, fastest_within
from onnxq.learning.speedup import HALVINGS as TIMED_HALVINGS
from onnxq.learning.widths import Widths, probe_of, widths_of
from onnxq.recipes.static import Static
from onnxq.runtime import Session
from onnxq.sensitivity import Probe, alone, judged_samples, points_lost, together

DEFAULT_BITS = 5.0
HALVINGS = 7  # of the interval of mean widths: a twentieth of a bit


@dataclass(frozen=True)
class Mixed:
    """Widths by integer programming over measured sensitivities.

    1. Rewrite the graph. For each layer and each width: the KL divergence of the output when this layer alone is
       quantized (ZeroQ, equation 5).
    2. Losses of layers add up: take the widths with the least sum that keep the budgets, by integer programming
       (HAWQ-V3) or from ZeroQ's Pareto front. Measure all chosen widths together beside the sum that was predicted.
       With ``max_drop`` the budget is found: the least mean width with which no more is lost, by bisection.
       With ``budget_speedup`` each layer has 8 bits or stays float, and costs the time that onnxruntime's profile
       shows for it; allocations are timed as a whole until one that loses least is as fast as wanted.
    3. Quantize with a format for each layer, rounding to the nearest or by a recipe that learns.

    Source: Y. Cai, Z. Yao, Z. Dong, A. Gholami, M. W. Mahoney, K. Keutzer, ZeroQ: A Novel Zero Shot Quantization
    Framework, CVPR 2020 (arXiv 2001.00281), sections 3.2 and 3.3; Z. Yao et al., HAWQ-V3, ICML 2021
    (arXiv 2011.10680), equations 6 to 8.

    Departures:
        - With activations of 8 bits, channels that stick out far are levelled first, as in the recipe int8.
        - Sensitivities come from the calibration samples, whatever they are; ZeroQ's are distilled.
        - Weights are clipped for the least error while sensitivities are measured; ZeroQ takes the extremes.
        - Activations may be chosen too (``activation_bits``); both papers tie them to the weights or to one width.
        - ``budget_mib`` is what will lie in the file: codes in the containers that the target reads (4 or 8 bits),
          and everything that stays float.

    Beside quantized activations both runtimes read weights from 8-bit containers, so that the file shrinks below
    int8 only with ``--activations float``.

    Attributes:
        weight_bits: The widths to choose from.
        activation_bits: The widths of what layers read to choose from; empty: the format of ``--activations`` for all.
        budget_bits: The mean width of weights; 5 where no budget is given.
        budget_mib: Size of all weights in the file.
        budget_bops: Bit operations of one sample in units of 10⁹: multiplications times both widths.
        max_drop: Instead of a budget: the points of top-1 that may be lost on the calibration samples, by their labels;
            without labels, the answers that may change, in percent.
        budget_speedup: How many times faster than float the whole has to be in onnxruntime on this machine, one thread,
            one sample; for ``--target cpu``, because an engine's time is not to be had without its GPU.
        judging_samples: How many samples ``max_drop`` is judged on, at most.
        solver: ``ilp``, or ``pareto`` (one budget at a time).
        rounding: ``nearest``, ``adaround``, ``brecq`` or ``qdrop``.
        iterations: Of a rounding that learns; 0: what ``--budget`` says.
        loss: What a sensitivity is: ``kl``, ``mse``, or ``auto``, KL where outputs are logits.
        sensitivity_samples: How many samples sensitivities are measured on.
        observer: How a range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
    """

    weight_bits: str = "2,3,4,5,6,8"
    activation_bits: str = ""
    budget_bits: float = 0.0
    budget_mib: float = 0.0
    budget_bops: float = 0.0
    max_drop: float = 0.0
    budget_speedup: float = 0.0
    judging_samples: int = 512
    solver: str = choice("ilp", "pareto")
    rounding: str = choice("nearest", "adaround", "brecq", "qdrop")
    iterations: int = 0
    loss: str = choice("auto", "kl", "mse")
    sensitivity_samples: int = 32
    observer: str = "mse"
    weight_ranges: str = "mse"

    def run(self, job: Job) -> None:
        """Quantize the job's model."""
        self._check()
        observer, search = observers.get(self.observer), weight_ranges.once(weight_ranges.get(self.weight_ranges))
        job.prepare()
        level(job)
        if self.budget_speedup:
            self._faster(job, observer, search)
            return
        widths = Widths(job, widths_of(self.weight_bits), widths_of(self.activation_bits))
        probe = probe_of(job, widths, self.loss, observer, search, self.sensitivity_samples)
        choices = self._choices(job, probe, widths)
        chosen = self._within_drop(job, probe, choices, widths) if self.max_drop else self._solve(choices, widths)
        for group, label in zip(widths.groups, chosen.labels, strict=True):
            job.exceptions |= {name: widths.schemes[label] for name in group.nodes}
        with job.progress.stage("sensitivity", "Checking the sum"):
            # Activations of one width for all are no choice, and no part of the sum.
            judged = {name: widths.measured(job.exceptions[name]) for group in widths.groups for name in group.nodes}
            measured = together(probe, judged)
        job.measurements |= _report(widths, chosen, measured)
        if self.rounding == "nearest":
            Static(observer=self.observer, weight_ranges=self.weight_ranges).quantize(job)
        else:
            learned = recipes.get(self.rounding).load()
            learned(iterations=self.iterations, observer=self.observer, weight_ranges=self.weight_ranges).run(job)  # type: ignore[call-arg]

    def _check(self) -> None:
        for knob in ("budget_bits", "budget_mib", "budget_bops", "max_drop", "budget_speedup"):
            if getattr(self, knob) < 0:
                raise OnnxqError(f"expected a positive {knob}, found {getattr(self, knob)}", hint="0 means no budget")
        if self.max_drop and (self.budget_bits or self.budget_mib or self.budget_bops):
            raise OnnxqError("expected max_drop or a budget, found both", hint="leave one out")
        if 0 < self.budget_speedup <= 1:
            raise OnnxqError(
                f"expected a budget_speedup above 1, found {self.budget_speedup:g}", hint="1.5 is half as fast again"
            )
        if self.budget_speedup and (self.budget_bits or self.budget_mib or self.budget_bops or self.max_drop):
            raise OnnxqError("expected budget_speedup or another goal, found both", hint="leave one out")
        if self.solver == "pareto" and len(self._budgets()) > 1:
            raise OnnxqError(
                f"expected one budget for solver=pareto, found {', '.join(self._budgets())}",
                hint="use --set solver=ilp for several",
            )

    def _faster(self, job: Job, observer: Observer, search: Search) -> None:
        """Quantize to 8 bits what has to be on codes for the whole to be as fast as wanted."""
        if job.target.name != "cpu" or not job.scheme.activations.enabled or job.is_large:
            found = "a model over 512 MiB" if job.is_large else f"--target {job.target.name}"
            raise OnnxqError(
                f"expected what onnxruntime's integer kernels run for budget_speedup, found {found} with "
                f"{job.scheme.activations.format.name} activations",
                hint="use --target cpu with 8-bit activations; the time of an engine has to be taken on its GPU",
            )
        widths = Widths(job, [8], [8])
        probe = probe_of(job, widths, self.loss, observer, search, self.sensitivity_samples)
        (label,) = widths.schemes
        schemes = {**widths.schemes, FLOAT: job.target.scheme("float", "float")}
        losses = [choice.loss for (choice,) in self._choices(job, probe, widths)]
        with job.progress.stage("time", "Timing", TIMED_HALVINGS + 2, "allocations") as advance:
            race = Race(job, widths.groups, schemes, observer, search)
            times = {name: race.times_ms(name) for name in (FLOAT, label)}
            choices = [
                [
                    Choice(name, loss if name == label else 0.0, {"ms": times[name].get(group.name, 0.0)})
                    for name in (FLOAT, label)
                ]
                for group, loss in zip(widths.groups, losses, strict=True)
            ]
            chosen = fastest_within(race, choices, self.budget_speedup, advance)
        job.exceptions |= race.exceptions(chosen.point.labels)
        Static(observer=self.observer, weight_ranges=self.weight_ranges).quantize(job)
        with job.progress.stage("time", "Timing the result"):
            result = race.time(job.model, chosen.point)
        if result.speedup < self.budget_speedup:
            job.warnings.append(
                f"the result is {result.speedup:.2f} times faster than float, {self.budget_speedup:g} were wanted: "
                f"while choosing it was {chosen.speedup:.2f}; on a busy machine times differ from run to run"
            )
        left_float = job.placement.left_float if job.placement is not None else {}
        job.measurements |= {
            "speedup": result.speedup,
            "speedup_wanted": self.budget_speedup,
            "speedup_ms": {"float": result.float_ms, "quantized": result.quantized_ms},
            "predicted_loss": chosen.point.loss,
            "layer_formats": {  # a layer whose neighbours are float may be placed so too
                name: FLOAT if name in left_float else choice
                for group, choice in zip(widths.groups, chosen.point.labels, strict=True)
                for name in group.nodes
            },
            "layer_ms": {
                group.name: {name: times[name].get(group.name, 0.0) for name in times} for group in widths.groups
            },
        }

    def _budgets(self) -> dict[str, float]:
        given = {"bits": self.budget_bits, "mib": self.budget_mib, "bops": self.budget_bops}
        return {name: value for name, value in given.items() if value > 0} or {"bits": DEFAULT_BITS}

    def _choices(self, job: Job, probe: Probe, widths: Widths) -> list[list[Choice]]:
        """Every pair of widths of every layer; what the weight loses and what the activation loses are added."""
        parts = widths.parts()
        losses: dict[str, dict[str, float]] = {}
        with job.progress.stage("sensitivity", "Measuring", len(parts) * len(widths.groups), "layers") as advance:
            for index, (label, scheme) in enumerate(parts.items()):
                done = index * len(widths.groups)
                losses[label] = alone(
                    probe,
                    {group.name: {name: scheme for name in group.nodes} for group in widths.groups},
                    lambda count, done=done: advance(done + count),  # type: ignore[misc]
                )
        return [
            [
                Choice(
                    label, sum(losses[part][group.name] for part in widths.parts_of(label)), widths.costs(group, label)
                )
                for label in widths.schemes
            ]
            for group in widths.groups
        ]

    def _within_drop(self, job: Job, probe: Probe, choices: Sequence[Sequence[Choice]], widths: Widths) -> Point:
        """The allocation of the least mean width that loses no more than ``max_drop``."""
        session = Session(job.model, device=job.settings.device)
        count = min(self.judging_samples, job.settings.samples or self.judging_samples)
        judging = replace(probe, samples=judged_samples(session, job.source, job.specs, count))

        def lost(point: Point) -> float:
            pairs = zip(widths.groups, point.labels, strict=True)
            schemes = {name: widths.measured(widths.schemes[label]) for group, label in pairs for name in group.nodes}
            return points_lost(judging, schemes)

        narrow, wide = (sum(pick(item.costs["bits"] for item in group) for group in choices) for pick in (min, max))
        with job.progress.stage("sensitivity", "Searching", HALVINGS + 1, "allocations") as advance:
            best = allocate(choices, {"bits": wide})
            drop = lost(best)
            if drop > self.max_drop:
                raise OnnxqError(
                    f"expected widths that lose at most {self.max_drop} points, found {drop:.2f} lost by the widest",
                    hint="raise max_drop, allow wider weight_bits, or try --set rounding=brecq with a budget",
                )
            for index in range(HALVINGS):
                advance(index + 1)
                middle = (narrow + wide) / 2
                tried = allocate(choices, {"bits": middle})
                found = lost(tried)
                if found <= self.max_drop:
                    best, drop, wide = tried, found, middle
                else:
                    narrow = middle
            advance(HALVINGS + 1)
        job.measurements["points_lost"] = drop
        return best

    def _solve(self, choices: Sequence[Sequence[Choice]], widths: Widths) -> Point:
        budgets = self._budgets()
        if "mib" in budgets:
            budgets["mib"] -= widths.fixed_mib
            if budgets["mib"] <= 0:
                raise OnnxqError(
                    f"expected budget_mib above {widths.fixed_mib:.3f} MiB, which stays float, found {self.budget_mib}",
                    hint="raise it",
                )
        if self.solver == "ilp":
            return allocate(choices, budgets)
        name, most = next(iter(budgets.items()))
        affordable = [point for point in pareto_front(choices, name) if point.cost <= most * (1 + 1e-9)]
        return affordable[-1] if affordable else allocate(choices, budgets)  # which says what the least is


def _report(widths: Widths, chosen: Point, measured: float) -> dict[str, Any]:
    formats: Mapping[str, str] = {
        name: label for group, label in zip(widths.groups, chosen.labels, strict=True) for name in group.nodes
    }
    costs = [widths.costs(group, label) for group, label in zip(widths.groups, chosen.labels, strict=True)]
    return {
        "layer_formats": formats,
        "mean_weight_bits": sum(cost["bits"] for cost in costs),
        "weights_mib": sum(cost["mib"] for cost in costs) + widths.fixed_mib,
        "giga_bit_operations": sum(cost["bops"] for cost in costs),
        "predicted_loss": chosen.loss,
        "measured_loss": measured,
    }
