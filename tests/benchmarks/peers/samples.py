"""What every peer script shares: its command line, the calibration samples read one at a time, and the clock."""

from __future__ import annotations

import argparse
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


class Samples:
    """The first rows of an .npz keyed by input name, each as a batch of one, read from the file as they are needed.

    It is a re-iterable for peers that take one, and onnxruntime's calibration data reader for those that take that:
    no peer is charged for keeping the samples in memory unless it insists on arrays (`arrays`).
    """

    def __init__(self, path: Path, count: int):
        self.path = path
        with np.load(path) as file:
            self.names = [name for name in file.files if name != "labels"]
        self.count = count
        self.iterator: Iterator[dict[str, np.ndarray]] = iter(self)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        with zipfile.ZipFile(self.path) as archive:
            streams = {name: rows(archive, f"{name}.npy") for name in self.names}
            for _ in range(self.count):
                sample = {name: next(stream, None) for name, stream in streams.items()}
                if any(value is None for value in sample.values()):
                    return
                yield sample

    def __len__(self) -> int:
        return self.count

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.iterator, None)

    def get_first(self) -> dict[str, np.ndarray]:
        return next(iter(self))

    def rewind(self) -> None:
        self.iterator = iter(self)

    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as file:
            return {name: file[name][: self.count] for name in self.names}


def rows(archive: zipfile.ZipFile, member: str) -> Iterator[np.ndarray]:
    """The rows of one array in an .npz, as batches of one."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read_header(file)
        size = int(np.prod(shape[1:])) * kind.itemsize
        for _ in range(shape[0]):
            yield np.frombuffer(file.read(size), kind).reshape(1, *shape[1:]).copy()


def main(quantize: Callable[[Path, Samples, Path, str], None], methods: list[str]) -> None:
    """Quantize as the command line asks, and print the seconds it took as one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--method", choices=methods, default=methods[0])
    options = parser.parse_args()
    samples = Samples(options.calibration, options.samples)
    start = time.perf_counter()
    quantize(options.model, samples, options.out, options.method)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 3)}), flush=True)
