"""Train the demo classifier on Fashion-MNIST and write the model with its calibration and test images.

    python models/train_fashion_classifier.py --data /usr/share/datasets/fashion-mnist

``--data`` is a folder with the data set's four ``*-ubyte.gz`` files; Debian's package
``dataset-fashion-mnist`` brings them. The recipe is fixed in advance and the last epoch is kept, so the test
images choose nothing. The same seed, thread count and torch version give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from export import export_keeping_batchnorm
from fashion_network import FashionResNet
from torch import Tensor, nn

from onnxq.errors import OnnxqError

FOLDER = Path(__file__).parent
CALIBRATION_IMAGES = 128
TEST_IMAGES = 1000
BATCH = 128
LARGEST_SHIFT = 2  # pixels
LARGEST_LEARNING_RATE = 0.2
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip entry can carry


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes: two zeros, the type, the rank, big-endian sizes, the data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise OnnxqError(f"expected an IDX file of unsigned bytes, found something else: {path}")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_images(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 1, 28, 28] float32 in [-1, 1] and labels [n] int64 of ``part``, which is train or t10k."""
    images, labels = (folder / f"{part}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    for file in (images, labels):
        if not file.is_file():
            raise OnnxqError(f"expected {file.name} in {folder}, found nothing", hint="--data names its folder")
    pixels = read_idx(images)[:, None].astype(np.float32)
    return pixels / np.float32(127.5) - np.float32(1), read_idx(labels).astype(np.int64)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each batch by up to two pixels; what moves in is black (-1)."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    row, column = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, [LARGEST_SHIFT] * 4, value=-1.0)
    return padded[:, :, row : row + 28, column : column + 28]


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> FashionResNet:
    """Nesterov momentum on one learning-rate cycle, with weight decay and mild label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # channels_last halves the time of these convolutions on CPUs.
    network = FashionResNet().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LARGEST_LEARNING_RATE, total_steps=epochs * batches)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    start = time.perf_counter()
    for epoch in range(epochs):
        total, correct = 0.0, 0
        for chosen in torch.randperm(len(images), generator=generator)[: batches * BATCH].split(BATCH):
            logits = network(augment(images[chosen], generator))
            loss = loss_of(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            correct += int((logits.argmax(1) == labels[chosen]).sum())
        print(
            f"epoch {epoch + 1}/{epochs}: loss {total / batches:.3f}, "
            f"training accuracy {correct / (batches * BATCH):.2%}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return network.to(memory_format=torch.contiguous_format).eval()


def count_correct(model: Path, images: np.ndarray, labels: np.ndarray) -> int:
    """How many images the exported model classifies correctly in onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"x": images[i : i + 500]})[0] for i in range(0, len(images), 500)]
    return int((np.concatenate(logits).argmax(1) == labels).sum())


def save_arrays(path: Path, *, compress: bool, **arrays: np.ndarray) -> None:
    """Write an ``.npz`` whose bytes depend on the arrays only; ``np.savez`` would add the time of day."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", ZIP_EPOCH)
            entry.compress_type = method
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of ``count`` random images, as equal a number of each class as ``count`` allows."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        positions = order[labels[order] == label]
        rank_in_class[positions] = np.arange(len(positions))
    return order[np.argsort(rank_in_class[order], kind="stable")][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo classifier on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to (default: this one)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="another number gives another rounding")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.output.is_dir():
        raise OnnxqError(f"expected a folder for --output, found none: {options.output}")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    images, labels = read_images(options.data, "train")
    test_images, test_labels = read_images(options.data, "t10k")
    network = train(torch.from_numpy(images), torch.from_numpy(labels), epochs=options.epochs, seed=options.seed)

    model = options.output / "fashion_resnet.onnx"
    example = torch.from_numpy(test_images[:2])
    export_keeping_batchnorm(network, (example,), model, input_names=["x"], output_names=["logits"])
    calibration = spread(labels, CALIBRATION_IMAGES, options.seed)
    save_arrays(options.output / "fashion_calibration.npz", compress=False, x=images[calibration])
    test = slice(TEST_IMAGES)  # the first ones: the published order of the test set is random already
    save_arrays(options.output / "fashion_test.npz", compress=True, x=test_images[test], labels=test_labels[test])
    print(f"test accuracy: {count_correct(model, test_images, test_labels)} of {len(test_labels)}")
    print(f"on fashion_test.npz: {count_correct(model, test_images[test], test_labels[test])} of {TEST_IMAGES}")


if __name__ == "__main__":
    try:
        main()
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
