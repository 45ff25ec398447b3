"""A folder of image files as a source of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnxq.calibration import picture_size
from onnxq.calibration.data import Array, InputSpec, Preprocessing, Sample
from onnxq.errors import OnnxqError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
USUAL_SIDE = 224  # of images whose size neither the model nor the user says
IMAGE_TYPES = (np.float32, np.float16, np.uint8)
MOST_PIXELS = 1 << 26  # of an image that is to be cropped: a strip would become gigabytes first


class Images:
    """A folder of image files; with one subfolder per class, their sorted order gives the labels.

    A model that reads bytes normalises them itself: it gets pixels from 0 to 255 as they are.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], specs: Sequence[InputSpec], preprocessing: Preprocessing
    ) -> None:
        needed, following = picture_size.apart(specs)
        images = [spec for spec in needed if len(spec.row_shape) == 3 and spec.dtype in IMAGE_TYPES]
        if len(needed) != 1 or not images:
            raise OnnxqError(
                f"expected a model with one image input, of floats or bytes, for the image folder {folder}, "
                f"found inputs {', '.join(spec.name for spec in specs)}",
                hint="write an .npz keyed by the model's input names instead",
            )
        self.spec = images[0]
        size = self.spec.row_shape
        if size[0] in (1, 3):
            self.planar, self.channel_count, height, width = True, size[0], size[1], size[2]
        elif size[2] in (1, 3):
            self.planar, self.channel_count, height, width = False, size[2], size[0], size[1]
        else:
            raise OnnxqError(
                f"expected an image input of 1 or 3 channels, found {self.spec.name} {list(self.spec.shape)}",
                hint="write an .npz keyed by the model's input names instead",
            )
        self.height, self.width = height or USUAL_SIDE, width or USUAL_SIDE
        self.told = picture_size.told(following, self.height, self.width)
        self.notes = []
        if not height or not width:
            self.notes.append(
                f"images were made {self.height}×{self.width}, because the model leaves their size free: --shapes "
                f"{self.spec.name}:… says another"
            )
        self.files = list(files)
        self.preprocessing = preprocessing
        classes = sorted({file.parent.name for file in files if file.parent != folder})
        self.labels = {name: index for index, name in enumerate(classes)} if len(classes) > 1 else {}

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        for file in self.files:
            sample = {self.spec.name: self._read(file), **self.told}
            if self.labels:
                sample["labels"] = np.asarray(self.labels[file.parent.name])
            yield sample

    def _read(self, file: Path) -> Array:
        from PIL import Image

        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB" if self.channel_count == 3 else "L")
        except MemoryError:
            raise
        except Exception as error:  # each format's reader has errors of its own
            raise OnnxqError(f"expected an image, found {file} ({error})", hint="remove or replace the file") from error
        if self.preprocessing.resize == "crop":
            ratio = max(self.width / picture.width, self.height / picture.height) / 0.875
            width, height = (
                max(self.width, round(picture.width * ratio)),
                max(self.height, round(picture.height * ratio)),
            )
            if width * height > MOST_PIXELS:
                raise OnnxqError(
                    f"expected an image with sides that compare, found {picture.width} by {picture.height}: {file}",
                    hint="remove the file, or set resize: squash",
                )
            picture = picture.resize((width, height))
            left, top = (picture.width - self.width) // 2, (picture.height - self.height) // 2
            picture = picture.crop((left, top, left + self.width, top + self.height))
        else:
            picture = picture.resize((self.width, self.height))
        pixels = np.asarray(picture).reshape(self.height, self.width, self.channel_count)
        if self.preprocessing.channels == "bgr":
            pixels = pixels[..., ::-1]
        if self.spec.dtype != np.uint8:
            mean = np.asarray(self.preprocessing.mean[: self.channel_count], np.float32)
            std = np.asarray(self.preprocessing.std[: self.channel_count], np.float32)
            pixels = (pixels / np.float32(self.preprocessing.scale) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.planar else pixels, self.spec.dtype)
