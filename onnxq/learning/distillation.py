"""Fine-tuning on calibration samples, with the float network as the teacher: end to end, or block by block."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from onnxq.autograd.blocks import Block
from onnxq.autograd.interpreter import TorchGraph
from onnxq.errors import OnnxqError
from onnxq.job import Job
from onnxq.learning import quantizers as found_quantizers
from onnxq.learning.cache import ActivationCache
from onnxq.learning.checkpoint import Checkpoint, fingerprint
from onnxq.learning.finetune import Batch, Batches, FineTuning, finetune
from onnxq.learning.losses import distillation
from onnxq.learning.student import Student
from onnxq.learning.walk import FLOAT, QUANTIZED, Walk, inside
from onnxq.runtime import Session

INPUTS = {"student": QUANTIZED, "teacher": FLOAT}


def distil_network(
    job: Job,
    outputs: Mapping[str, str],
    options: FineTuning,
    *,
    temperature: float,
    samples: int,
    cache_mib: int,
    teacher: Session | None = None,
    starts: Mapping[str, Tensor] | None = None,
    augment: Callable[[Batches], Batches] | None = None,
) -> None:
    """Train the whole Q/DQ graph to give the float network's outputs; both run on the same samples.

    The teacher runs once over the samples, and what it gives is kept; augmented batches are new to it in every step.

    Args:
        job: After ``insert`` and with all scales set.
        outputs: The values to compare, and how (see :func:`losses.compared_outputs`).
        options: How.
        temperature: Of the logits.
        samples: How many calibration samples to learn from.
        cache_mib: Memory for inputs and the teacher's outputs; beyond it they go to disk.
        teacher: The float network, where it is not the graph without its Q/DQ.
        starts: See :class:`Student`.
        augment: Makes other batches of batches of samples (:mod:`onnxq.learning.augmentation`).
    """
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = found_quantizers.find(job.model.graph)
    key = fingerprint(
        job.model, "network", outputs, options, temperature, samples, job.settings.seed, sorted(starts or ()), augment
    )
    inputs = tuple(graph.input_names)
    whole = [Block(name, inputs, name, ()) for name in outputs]
    with (
        ActivationCache(cache_mib << 20, device=job.settings.device) as cache,
        job.progress.stage("learn", "Fine-tuning", options.steps, "steps") as advance,
    ):
        walk = Walk(graph, quantizers, whole, cache)
        walk.fill(job.source, job.specs, samples)
        for block in whole if augment is None else ():
            if teacher is None:
                walk.prepare(block)
            else:
                walk.prepare_from(block, teacher)
        student = _student(graph, quantizers, options, starts=starts)
        batches = sampled(walk, whole, FLOAT, options.batch, job.settings.seed, targets=augment is None)
        learned = finetune(
            student,
            batches if augment is None else augment(batches),
            list(outputs),
            distillation(outputs, temperature),
            options,
            checkpoint=Checkpoint(job.checkpoint, key),
            on_step=advance,
        )
    found_quantizers.store(graph, learned)


def distil_blocks(
    job: Job,
    blocks: Sequence[Block],
    options: FineTuning,
    *,
    inputs: str,
    samples: int,
    cache_mib: int,
    starts: Mapping[str, Tensor] | None = None,
) -> None:
    """Layer-by-layer knowledge distillation: each block in turn learns to give the float network's output of it.

    Only one block is in the optimiser's memory at a time.

    Source: Z. Yao et al., ZeroQuant, NeurIPS 2022 (arXiv 2206.01861), section 4.3 and equation 3.

    Args:
        job: After ``insert`` and with all scales set.
        blocks: Of the float graph, before ``insert``.
        options: How each block learns.
        inputs: ``teacher``, what the float network has at the block's start (the paper's), or ``student``, what the
            finished part of the quantized network makes of the samples, so that its error is taken up.
        samples: How many calibration samples to learn from.
        cache_mib: Memory for activations; beyond it they go to disk.
        starts: See :class:`Student`.
    """
    if inputs not in INPUTS:
        raise OnnxqError(
            f"expected block_inputs of {', '.join(INPUTS)}, found {inputs!r}", hint="use --set block_inputs=student"
        )
    if options.weight_rate <= 0 >= options.step_rate:
        raise OnnxqError(
            "expected weights or steps that learn, found neither",
            hint="raise weight_rate or step_rate, or use --recipe default",
        )
    graph = TorchGraph(job.model, job.settings.device)
    quantizers = found_quantizers.find(job.model.graph)
    done = Checkpoint(
        job.checkpoint,
        fingerprint(job.model, "blocks", options, inputs, samples, job.settings.seed, sorted(starts or ())),
    )
    whole_blocks = replace(options, save_every=options.steps + 1)  # a block is finished soon: kept whole or not at all
    settled: set[str] = set()  # an initializer that two blocks share is learned in the first
    with (
        ActivationCache(cache_mib << 20, device=job.settings.device) as cache,
        job.progress.stage("learn", "Fine-tuning", len(blocks), "blocks") as advance,
    ):
        walk = Walk(graph, quantizers, blocks, cache)
        walk.fill(job.source, job.specs, samples)
        for position, block in enumerate(blocks):
            walk.prepare(block)
            finished = done.load(block.name)
            if finished is None:
                student = _student(graph, quantizers, options, inside(graph, block), settled, starts)
                seed = zlib.crc32(block.name.encode()) ^ job.settings.seed
                learned = {}
                if student.masters or student.steps():
                    learned = finetune(
                        student,
                        sampled(walk, [block], INPUTS[inputs], options.batch, seed),
                        [block.output],
                        distillation({block.output: "mse"}),
                        whole_blocks,
                    )
                finished = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
                done.save(block.name, finished)
            found_quantizers.store(graph, finished)
            settled.update(finished)
            walk.advance(block)
            advance(position + 1)


def sampled(walk: Walk, blocks: Sequence[Block], kind: str, batch: int, seed: int, *, targets: bool = True) -> Batches:
    """Batches of a walk's samples, each sample once before any comes again; the order depends on the seed alone.

    Args:
        walk: Filled, and prepared for the blocks.
        blocks: Whose inputs and targets are wanted.
        kind: Whether inputs are the float network's or the quantized one's.
        batch: Samples in a step.
        seed: Of the order.
        targets: Whether the float network's values at the ends of the blocks come along.
    """
    size = min(batch, walk.samples)
    per_epoch = walk.samples // size

    def at(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(walk.samples)
        index = np.sort(order[position * size : (position + 1) * size])
        inputs: dict[str, Tensor] = {}
        for block in blocks:
            inputs |= walk.inputs(block, index, kind)
        return Batch(inputs, {block.output: walk.target(block, index) for block in blocks if targets})

    return at


def _student(
    graph: TorchGraph,
    quantizers: Sequence[found_quantizers.Quantizer],
    options: FineTuning,
    within: set[str] | None = None,
    frozen: set[str] | None = None,
    starts: Mapping[str, Tensor] | None = None,
) -> Student:
    """What learns: a rate of 0 keeps weights or steps."""
    return Student(
        graph,
        quantizers,
        within,
        frozen or (),
        starts,
        learn_weights=options.weight_rate > 0,
        learn_steps=options.step_rate > 0,
        scaled=options.optimizer == "sgd",
    )
