"""Where calibration inputs come from: npz files, folders of images, any iterable of dicts. Always streamed.

A source yields one sample at a time, as a dict from input name to an array without the batch axis, so that
memory does not grow with the number of samples; of an input that has no batch axis, a sample holds the whole. Labels,
where a source has them, come under ``labels``; inputs of a denoiser carry under ``step`` which step of the sampler
they were seen in (0 is the first, the noisiest).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxq.calibration.batch_axis import whole_inputs
from onnxq.calibration.sizes import dimensions_of
from onnxq.errors import OnnxqError

Array = np.ndarray[Any, Any]
Sample = dict[str, Array]

LABEL_KEYS = ("labels", "label")
STEP_KEY = "step"
RANGE_RULE_KEY = "onnxq.observer"  # of inputs that were made: the range rule that suits them
MATCHED_RULE = "widened"  # that of inputs which match what a model remembers of each channel
LARGEST_INPUT_BYTES = 4 << 30


class Source(Protocol):
    """Samples that can be read again from the start."""

    def __iter__(self) -> Iterator[Sample]: ...

    def __len__(self) -> int: ...


def shows_channels(source: Source) -> bool:
    """Whether samples tell which channels are large: real ones do, made ones if they match remembered statistics."""
    return not getattr(source, "is_made_up", False) or getattr(source, "observer", None) == MATCHED_RULE


@dataclass(frozen=True)
class InputSpec:
    """What the model says about one of its inputs.

    Attributes:
        name: The input's name.
        dtype: Its numpy dtype; float32 for bfloat16, which numpy does not have and sessions take so.
        shape: Its dimensions; ``None`` where they are free and none was chosen (:mod:`onnxq.calibration.sizes`).
        is_whole: Whether it has no batch axis: one for all rows of a batch, as a timestep of rank 0.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    is_whole: bool = False

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or ``None`` where the first axis is free (or none is the batch)."""
        return None if self.is_whole else self.shape[0]

    @property
    def row_shape(self) -> tuple[int | None, ...]:
        """The dimensions of one sample."""
        return self.shape if self.is_whole else self.shape[1:]

    @property
    def is_picture(self) -> bool:
        """Whether it has the axes of grey or coloured pictures; the latents of a decoder, say, do not."""
        return len(self.shape) == 4 and bool({self.shape[1], self.shape[3]} & {1, 3})

    @property
    def sides(self) -> tuple[int | None, ...]:
        """Height and width of a picture."""
        return self.shape[2:] if self.shape[1] in (1, 3) else self.shape[1:3]

    @property
    def holds_bytes(self) -> bool:
        """Whether it is a picture of bytes, which the model normalises itself."""
        return self.is_picture and self.dtype == np.uint8

    def example(self, side: int) -> str:
        """What ``--shapes`` could say of it: one row, and ``side`` where a later dimension is free.

        What has no batch axis of its own, as a recurrent state [2, batch, 64], has no sides: its free ones are 1.
        """
        free = [1 if axis == 0 or self.is_whole else side for axis in range(len(self.shape))]
        sizes = [str(size or other) for size, other in zip(self.shape, free, strict=True)]
        return f"--shapes {self.name}:{'x'.join(sizes)}"


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The inputs that a run of the model must be given."""
    specs = []
    inputs = [value for value in model.graph.inputs if not value.is_initializer() and value.name is not None]
    whole = whole_inputs(inputs)
    for value in inputs:
        dimensions = dimensions_of(value)
        known = value.dtype or ir.DataType.FLOAT
        dtype = np.dtype(np.float32 if known == ir.DataType.BFLOAT16 else known.numpy())
        if math.prod(size or 1 for size in dimensions) * dtype.itemsize > LARGEST_INPUT_BYTES:
            raise OnnxqError(
                f"expected inputs below {LARGEST_INPUT_BYTES >> 30} GiB, found {value.name!r} of shape {value.shape}",
                hint="check the shapes that the model was exported for",
            )
        assert value.name is not None
        specs.append(InputSpec(value.name, dtype, dimensions, value.name in whole or not dimensions))
    return specs


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The number of rows that an export was fixed to; ``None`` where it takes any."""
    return next((spec.batch for spec in specs if spec.batch is not None), None)


def open_source(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Array]],
    specs: Sequence[InputSpec],
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Open whatever the user gave: an ``.npz`` file, a folder of images or npz files, or an iterable of dicts.

    Raises:
        OnnxqError: nothing usable is there.
    """
    from onnxq.calibration.archives import Npz

    if not isinstance(data, (str, os.PathLike)):
        return Iterables(data, specs)
    path = Path(data)
    if path.is_dir():
        return _open_folder(path, specs, preprocessing)
    if not path.is_file():
        raise OnnxqError(f"expected calibration data at {path}, found nothing", hint="check --data")
    if path.suffix == ".npy" and len(specs) == 1:
        raise OnnxqError(
            f"expected an .npz keyed by input name, found a single array: {path}",
            hint=f"write it with np.savez('data.npz', **{{{specs[0].name!r}: array}})",
        )
    if path.suffix == ".txt":
        return _open_text(path, specs, preprocessing or Preprocessing())
    return Npz(path, specs)


def _open_text(path: Path, specs: Sequence[InputSpec], preprocessing: Preprocessing) -> Source:
    from onnxq.calibration.text import Text
    from onnxq.calibration.tokenizers import open_tokenizer

    if preprocessing.tokenizer is None:
        raise OnnxqError(
            f"expected a tokenizer for the text file {path}, found none",
            hint="give --tokenizer tokenizer.json, or write an .npz of tokens keyed by the model's input names",
        )
    return Text(path, open_tokenizer(preprocessing.tokenizer), specs, preprocessing.sequence_length)


def _open_folder(path: Path, specs: Sequence[InputSpec], preprocessing: Preprocessing | None) -> Source:
    from onnxq.calibration.archives import Npz
    from onnxq.calibration.images import IMAGE_SUFFIXES, Images

    archives = sorted(path.glob("*.npz"))
    if archives:
        return Chained([Npz(archive, specs) for archive in archives])
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise OnnxqError(
            f"expected .npz files or images in {path}, found neither",
            hint=f"images end in {', '.join(IMAGE_SUFFIXES)}; npz files are keyed by the model's input names",
        )
    return Images(path, images, specs, preprocessing or Preprocessing())


class Chained:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __iter__(self) -> Iterator[Sample]:
        return itertools.chain.from_iterable(self.sources)


class Spread:
    """Evenly spaced samples of another source, of some sampler steps alone if asked for.

    Args:
        source: The other source.
        count: How many of its samples, at most.
        steps: The steps to take samples of; ``None``: all, also where samples carry none.
    """

    def __init__(self, source: Source, count: int, steps: set[int] | None = None) -> None:
        self.source, self.steps = source, steps
        self._length = min(count, len(source))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        samples: Iterable[Sample] = self.source
        total = len(self.source)
        if self.steps is not None:
            steps = self.steps
            total = sum(int(sample[STEP_KEY]) in steps for sample in self.source)
            samples = (sample for sample in self.source if int(sample[STEP_KEY]) in steps)
        wanted = set(np.linspace(0, total - 1, min(self._length, total)).round().astype(int).tolist())
        return (sample for index, sample in enumerate(samples) if index in wanted)


class Iterables:
    """Any iterable of dicts; each holds one batch (with the batch axis) of every input.

    What has no axis for the batch, as a timestep of rank 0, belongs to every row of its batch, and so does the one row
    of what the model reads one row of.
    """

    def __init__(self, batches: Iterable[Mapping[str, Array]], specs: Sequence[InputSpec] = ()) -> None:
        self._axes = {spec.name: len(spec.shape) for spec in specs if spec.is_whole}
        self._specs = specs
        if iter(batches) is batches:
            batches = list(batches)  # a generator can be read once only, and results are checked on the same data
        self.batches = batches

    def __len__(self) -> int:
        return sum(self._rows({key: np.asarray(value) for key, value in batch.items()}) for batch in self.batches)

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.batches:
            arrays = {key: np.asarray(value) for key, value in batch.items()}
            for row in range(self._rows(arrays)):
                yield {
                    key: array[row % len(array)] if self._has_rows(key, array) else array
                    for key, array in arrays.items()
                }

    def _has_rows(self, key: str, array: Array) -> bool:
        return array.ndim > self._axes.get(key, 0)

    def _rows(self, arrays: Mapping[str, Array]) -> int:
        """How many samples a batch holds."""
        lengths = {key: len(array) for key, array in arrays.items() if self._has_rows(key, array)}
        for key in single_rows(lengths, self._specs):
            del lengths[key]
        if len(set(lengths.values())) > 1:
            raise OnnxqError(
                "expected batches with as many rows of each input, found "
                + ", ".join(f"{length} of {key}" for key, length in lengths.items()),
                hint="the first axis of every array counts the samples",
            )
        return next(iter(lengths.values()), 1)


def single_rows(lengths: Mapping[str, int], specs: Sequence[InputSpec]) -> set[str]:
    """Inputs whose only row belongs to all samples: the model reads no more at a time, and other inputs have more.

    Args:
        lengths: How many rows there are, by name.
        specs: The model's inputs.
    """
    single = {spec.name for spec in specs if spec.batch == 1 and lengths.get(spec.name) == 1}
    return single if any(length > 1 for length in lengths.values()) else set()


@dataclass(frozen=True)
class Preprocessing:
    """How image and text files become the model's input.

    Attributes:
        mean: Subtracted per channel after ``scale``.
        std: Divided by per channel.
        scale: Pixel values 0..255 are divided by it first.
        channels: ``rgb`` or ``bgr``.
        resize: ``crop`` (shorter side to size/0.875, then a centre crop) or ``squash``.
        tokenizer: The file of the tokenizer, for text.
        sequence_length: Tokens in a sample, where the model does not fix it.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = 255.0
    channels: str = "rgb"
    resize: str = "crop"
    tokenizer: str | None = None
    sequence_length: int = 256


def batches(
    source: Source, specs: Sequence[InputSpec], *, batch_size: int = 1, samples: int | None = None
) -> Iterator[dict[str, Array]]:
    """Feeds for the model: rows stacked to its batch size, checked against its inputs.

    A fixed batch in the model overrides ``batch_size``; an incomplete last batch is then dropped, unless it is
    the only one (which is filled by repeating its rows). Labels are passed through as ``labels``, and sampler steps as
    ``step``; :func:`inputs_of` leaves them out.

    Raises:
        OnnxqError: a name, dtype or shape does not fit the model, or a value is not finite.
    """
    fixed = fixed_batch(specs)
    whole = [spec.name for spec in specs if spec.is_whole]
    size = fixed or (1 if whole else batch_size)  # one timestep for the whole batch: samples go one by one
    rows: list[Sample] = []
    count = 0
    for sample in itertools.islice(source, samples):
        checked = _checked(sample, specs, count)
        if rows and not all(np.array_equal(rows[0][name], checked[name]) for name in whole):
            yield _stack(_filled(rows, size), specs)
            rows = []
        rows.append(checked)
        count += 1
        if len(rows) == size:
            yield _stack(rows, specs)
            rows = []
    if count == 0:
        raise OnnxqError("expected at least one sample, found none", hint="check --data and --samples")
    if rows and (fixed is None or whole or count < size):
        yield _stack(rows if fixed is None else _filled(rows, size), specs)


def _filled(rows: Sequence[Sample], size: int) -> list[Sample]:
    """As many rows as the model reads, which repeat."""
    return [rows[index % len(rows)] for index in range(size)]


def row_count(feed: Mapping[str, Array], specs: Sequence[InputSpec]) -> int:
    """How many samples a feed holds."""
    return next((len(feed[spec.name]) for spec in specs if not spec.is_whole), 1)


def inputs_of(batch: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    """What of a batch the model is given: no labels, no steps."""
    return {spec.name: batch[spec.name] for spec in specs}


def _stack(rows: Sequence[Sample], specs: Sequence[InputSpec]) -> dict[str, Array]:
    whole = {spec.name for spec in specs if spec.is_whole}
    try:
        return {key: rows[0][key] if key in whole else np.stack([row[key] for row in rows]) for key in rows[0]}
    except ValueError as error:
        shapes = ", ".join(sorted({str(list(row[spec.name].shape)) for row in rows for spec in specs}))
        raise OnnxqError(
            f"expected samples of one shape in a batch, found {shapes}",
            hint="pad or crop them to one size",
        ) from error


def _checked(sample: Sample, specs: Sequence[InputSpec], index: int) -> Sample:
    checked = {}
    for spec in specs:
        if spec.name not in sample:
            raise OnnxqError(
                f"expected input {spec.name!r} in sample {index}, found {', '.join(sorted(sample)) or 'nothing'}",
                hint="key the data by the model's input names",
            )
        value = np.asarray(sample[spec.name])
        if value.dtype != spec.dtype:
            same_kind = np.can_cast(value.dtype, spec.dtype, "same_kind") or (
                value.dtype.kind in "iu" and spec.dtype.kind in "iu"
            )
            if not same_kind:
                raise OnnxqError(
                    f"expected {spec.dtype} for input {spec.name!r}, found {value.dtype} (sample {index})",
                    hint="convert the array, and preprocess it as the model expects",
                )
            value = value.astype(spec.dtype)
        expected = spec.row_shape
        fits = len(value.shape) == len(expected) and all(
            want is None or want == have for want, have in zip(expected, value.shape, strict=True)
        )
        if not fits:
            axis = "samples" if spec.is_whole else "batch"
            wanted = [axis, *("any" if size is None else size for size in expected)]
            raise OnnxqError(
                f"expected shape [{', '.join(map(str, wanted))}] for input {spec.name!r}, "
                f"found [{', '.join(map(str, (axis, *value.shape)))}] (sample {index})",
                hint="check the layout (NCHW or NHWC) and the size",
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise OnnxqError(
                f"expected finite numbers for input {spec.name!r}, found NaN or infinity (sample {index})",
                hint="clean the data; one such value would spoil every scale",
            )
        checked[spec.name] = value
    for key in LABEL_KEYS:
        if key in sample and key not in checked:
            checked["labels"] = np.asarray(sample[key])
    if STEP_KEY in sample and STEP_KEY not in checked:
        checked[STEP_KEY] = np.asarray(sample[STEP_KEY]).astype(np.int64)
    return checked
