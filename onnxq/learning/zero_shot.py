"""What fine-tuning without data has in common: a float network, its quantized self, and made images between them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import TorchGraph
from onnxq.calibration import observers, weight_ranges
from onnxq.calibration.data import batches as batches_of
from onnxq.calibration.data import inputs_of
from onnxq.calibration.insert_calibrated import insert_calibrated
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.knobs import choice
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.learning.distillation import sampled
from onnxq.learning.finetune import Batches, Companion, FineTuning, Term, finetune
from onnxq.learning.keep_best import KeepBest
from onnxq.learning.losses import Loss, compared_outputs, distillation
from onnxq.learning.student import Student, input_weights
from onnxq.learning.walk import FLOAT, ROWS, Walk
from onnxq.synthesis.centers import Centers
from onnxq.synthesis.features import residual_branches, stage_ends
from onnxq.synthesis.game import Game, GameTerm
from onnxq.synthesis.network import Network, require_images
from onnxq.synthesis.player import Player
from onnxq.synthesis.synthesize import Synthesised, synthesise
from onnxq.synthesis.terms import MatchStatistics, PredictClasses

STEPS = {"quick": 200, "default": 1000, "paper": 80000}
WARM_UP = {"quick": 100, "default": 400, "paper": 800}  # moves of the generator alone; half the steps at most
SAVE_EVERY = 200  # steps between two checkpoints
LOOKS = 10  # at the student on its way
JUDGED = 64  # samples
SIZED = 32  # samples that tell how large inputs are
# At 20 the divergence is near the squared error of logits, and falls while the network gets better; at 1 it rises,
# for the few of so many samples that a narrow network is sure of and wrong about.
JUDGING_TEMPERATURE = 20.0


@dataclass(frozen=True, kw_only=True)
class ZeroShotKnobs:
    """How a student starts and learns: the knobs that all recipes of fine-tuning without data share.

    Attributes:
        steps: Steps of the optimiser; 0: what ``--budget`` says.
        batch: Images in a step.
        optimizer: Of the student: ``adam`` or ``sgd``.
        weight_rate: Rate of weights and biases.
        step_rate: Rate of steps; 0 keeps the calibrated ones.
        observer: How the first range follows from the statistics of an activation.
        weight_ranges: ``mse``, the clip with the least error, or ``minmax``.
        bias_correction: Whether biases start where they take back the mean error of the rounded weights.
        images: How many inputs are made for the first ranges; 0: the usual number.
    """

    steps: int = 0
    batch: int = 32
    optimizer: str = choice("adam", "sgd")
    weight_rate: float = 1e-5
    step_rate: float = 1e-4
    observer: str = "mse"
    weight_ranges: str = "mse"
    bias_correction: bool = True
    images: int = 0


class ZeroShot:
    """A float network and a student that learns from it.

    Made by quantizing the job's model: rewrites, Q/DQ, ranges from its calibration inputs, which are made ones too
    unless the user has some.

    Args:
        job: Its model is still float.
        knobs: How the student starts and learns: the recipe, which a run shares with the one that it resumes.
        classes: Whether the recipe needs a classifier.
        statistics: Whether it needs BatchNormalization.
        made: The method and the number of images that the student learns from, where they are made before. Ranges
            never come from them: images that are sure of their class excite a network less than real ones do.

    Raises:
        OnnxqError: the model has not what the recipe needs, or has more than one input.

    Attributes:
        network: The float network with its BatchNormalization.
        made: The images that were made before.
        student: What learns.
        outputs: The values that student and teacher are compared by, and how.
        logits: The classifier's logits; "" where there is none.
        stages: Values at the ends of the network's stages.
        branches: Values at the ends of residual branches.
    """

    def __init__(
        self, job: Job, knobs: ZeroShotKnobs, *, classes: bool, statistics: bool, made: tuple[str, int] | None = None
    ) -> None:
        self.job, self.knobs = job, knobs
        require_images(job.model, job.settings.recipe, "use --recipe genie, or lsq with --data")
        observe, search = observers.get(knobs.observer), weight_ranges.get(knobs.weight_ranges)
        self.network = Network(job.model.clone(), job.settings.seed, job.settings.device)
        if statistics and not self.network.layers:
            raise OnnxqError(
                f"expected BatchNormalization nodes with constant statistics for {job.settings.recipe}, found none",
                hint="export it with them (torch.onnx.export: dynamo=True, optimize=False), give --statistics, or use "
                "--recipe zaq",
            )
        self.made = None if made is None else self._make(*made)
        job.prepare()
        self.outputs = compared_outputs(job.model)
        self.logits = next((name for name, kind in self.outputs.items() if kind == "kl"), "")
        if classes and not self.logits:
            raise OnnxqError(
                f"expected a classifier with logits [batch, classes] for {job.settings.recipe}, found outputs of "
                "another kind",
                hint="use --recipe zaq, which compares any outputs, or genie",
            )
        self.stages, self.branches = stage_ends(job.model.graph), residual_branches(job.model.graph)
        biases = insert_calibrated(job, observe, search, corrects_biases=knobs.bias_correction, is_teacher=True).biases
        self.graph = TorchGraph(job.model, job.settings.device)
        self.student = Student(
            self.graph,
            found_quantizers.find(job.model.graph),
            starts={name: torch.from_numpy(array) for name, array in biases.items()},
            learn_weights=knobs.weight_rate > 0,
            learn_steps=knobs.step_rate > 0,
            scaled=knobs.optimizer == "sgd",
        )
        size = self._input_size()
        if size > 1:
            self.student.input_sizes |= dict.fromkeys(input_weights(job.model.graph, self.student.quantizers), size)
        self.steps = knobs.steps or STEPS[job.settings.budget]

    def _input_size(self) -> float:
        """The root of the mean square of inputs, as a power of two: 128 of bytes, 1 of what is normalised."""
        rows = itertools.islice(iter(self.job.source), SIZED)
        power = float(np.mean([np.square(row[self.network.input], dtype=np.float64).mean() for row in rows]))
        return float(2.0 ** max(0, math.floor(0.5 * math.log2(max(power, 1.0)))))

    def player(self, rate: float, *, conditional: bool) -> Player:
        """A generator of the network's inputs."""
        channels, height, width = self.network.shape
        classes = self.network.classes() if conditional else 0
        return Player(
            (channels, height, width), classes, self.job.settings.seed, rate=rate, device=self.job.settings.device
        )

    def game(
        self,
        player: Player,
        terms: Sequence[tuple[float, GameTerm]],
        *,
        reads_student: bool,
        features: Sequence[str] = (),
        student_steps: int = 1,
    ) -> Game:
        """Batches from a generator that learns beside the student.

        Args:
            player: The generator.
            terms: What it minimises, with weights.
            reads_student: Whether a term looks at the student's values.
            features: Values beside the outputs that terms look at.
            student_steps: Steps of the student for each of the generator.
        """
        wanted = [*self.outputs, *features]

        def teacher(images: Tensor) -> dict[str, Tensor]:
            if features or not self.network.layers or not self.logits:
                return self.student.teach(self.network.inputs(images), wanted)
            assert self.network.logits is not None
            taps = [layer.value for layer in self.network.layers]
            found = self.network.graph.run(self.network.given(images), [*taps, self.network.logits])
            return found | {self.logits: found[self.network.logits]}

        def student(images: Tensor) -> dict[str, Tensor]:
            return self.student.run(self.network.inputs(images), wanted)

        return Game(
            player,
            self.network.inputs,
            teacher,
            student if reads_student else None,
            terms,
            batch=self.knobs.batch,
            warm_up=min(WARM_UP[self.job.settings.budget], self.steps // 2),
            student_steps=student_steps,
        )

    @contextlib.contextmanager
    def samples(self, cache_mib: int) -> Iterator[Batches]:
        """Batches of the images that were made before.

        Args:
            cache_mib: Memory for them; what is more goes to a file.
        """
        assert self.made is not None
        inputs = (self.network.input,)
        with ActivationCache(cache_mib << 20, device=self.job.settings.device) as cache:
            whole = [Block(name, inputs, name, ()) for name in self.outputs]
            walk = Walk(self.graph, self.student.quantizers, whole, cache)
            walk.fill(self.made, self.job.specs, len(self.made))
            yield sampled(walk, whole[:1], FLOAT, self.knobs.batch, self.job.settings.seed, targets=False)

    def _make(self, method: str, count: int) -> Synthesised:
        job = self.job
        made = synthesise(
            job.model,
            method,
            count=count,
            budget=job.settings.budget,
            seed=job.settings.seed,
            device=job.settings.device,
            checkpoint=None if job.checkpoint is None else job.checkpoint / method,
            progress=job.progress,
        )
        job.measurements["made"] = made.description
        return made

    def centers(self) -> Centers:
        """Statistics by class of the images that were made before, and of what the float network takes them for."""
        logits = self.network.logits
        assert logits is not None and self.made is not None
        found = Centers(self.network.layers, self.network.classes())
        wanted = [layer.value for layer in found.layers] + [logits]
        for batch in batches_of(self.made, self.job.specs, batch_size=ROWS):
            given = {name: torch.from_numpy(array) for name, array in inputs_of(batch, self.job.specs).items()}
            with torch.no_grad():
                taps = self.network.graph.run(
                    {name: value.to(self.network.graph.device) for name, value in given.items()}, wanted
                )
            found.add(taps, taps[logits].argmax(1))
        return found

    def statistics(self) -> GameTerm:
        """The squared distance to what BatchNormalization remembers, averaged over layers."""
        term = MatchStatistics(self.network.layers, per_sample=False, mean_of_channels=True, variances=True)
        count = len(self.network.layers)
        return lambda move: term(move.images, move.teacher) / count

    def classes(self) -> GameTerm:
        """The cross-entropy of what the float network predicts and the classes that were drawn."""
        return lambda move: PredictClasses(self.logits, move.labels)(move.images, move.teacher)

    def finetune(
        self,
        batches: Batches,
        loss: Loss,
        *,
        features: Sequence[str] = (),
        terms: Sequence[Term] = (),
        companions: Sequence[Companion] = (),
    ) -> None:
        """Train the student and write the job's model as it was when calibration inputs were predicted best.

        Args:
            batches: Where it learns.
            loss: Of its values and the float network's.
            features: Values beside the outputs that the loss reads.
            terms: Further terms.
            companions: What learns beside it.
        """
        job, knobs = self.job, self.knobs
        options = FineTuning(
            self.steps, knobs.batch, knobs.optimizer, knobs.weight_rate, knobs.step_rate, save_every=SAVE_EVERY
        )
        key = fingerprint(job.model, "zero-shot", options, knobs, job.settings.seed)
        best = KeepBest(self.student, self._judge(), self.steps // LOOKS)
        with job.progress.stage("learn", "Fine-tuning", self.steps, "steps") as advance:

            def on_step(step: int) -> None:
                best(step)
                advance(step)

            finetune(
                self.student,
                batches,
                [*self.outputs, *features],
                loss,
                options,
                terms=terms,
                companions=[*companions, best],
                checkpoint=Checkpoint(job.checkpoint, key),
                on_step=on_step,
            )
        found_quantizers.store(self.graph, best.learned())
        job.measurements |= {"held_out_loss": [best.first, best.least], "best_step": best.step}
        if best.step == 0:
            job.warnings.append(
                "fine-tuning did not help: on calibration inputs the network was best before the first step, and is "
                "what nearest rounding makes of it"
            )
        job.lower()

    def _judge(self) -> Callable[[], float]:
        """The loss on calibration inputs, which no student of a game learns from."""
        loss = distillation(self.outputs, JUDGING_TEMPERATURE)
        kept = []
        for batch in batches_of(self.job.source, self.job.specs, batch_size=ROWS, samples=JUDGED):
            given = {
                name: torch.from_numpy(array).to(self.graph.device)
                for name, array in inputs_of(batch, self.job.specs).items()
            }
            with torch.no_grad():
                kept.append((given, self.student.teach(given, self.outputs)))

        def judge() -> float:
            with torch.no_grad():
                return float(np.mean([float(loss(self.student.run(given, self.outputs), wanted))
                                      for given, wanted in kept]))  # fmt: skip

        return judge


def labelled(loss: Loss, game: Game, logits: str, weight: float) -> Loss:
    """A loss with the cross-entropy of the student and the classes that a game has drawn (GDFQ, equation 7)."""

    def total(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        labels = game.labels.to(student[logits].device)
        return loss(student, teacher) + weight * torch.nn.functional.cross_entropy(student[logits], labels)

    return total
