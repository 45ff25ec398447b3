"""What the interpreter costs beside the same network as an eager torch module, forward and backward.

    PYTHONPATH=. python tests/benchmarks/interpreter_overhead.py --networks resnet,vit,unet --rounds 7

Both run in turn, in one process, on one thread; a ratio is of two medians of processor time, so that other work on
the machine counts little. Exports keep BatchNormalization, so that both do the same arithmetic. The bar is 1.2.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_networks import UNet, ViT, _Attention, _Layer, _Residual

from onnxq.autograd.interpreter import TorchGraph
from onnxq.model import load

BATCH = 8


def resnet18() -> nn.Module:
    """The layers of ResNet-18."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    pairs = itertools.pairwise(widths)
    blocks = [_Residual(before, after, 2 if after > before else 1) for before, after in pairs]
    stem = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def vit_small() -> nn.Module:
    """Six layers of a small vision transformer's width, on 196 patches."""
    network = ViT()
    network.patches = nn.Conv2d(3, 384, 16, 16)
    network.token = nn.Parameter(torch.randn(1, 1, 384))
    network.positions = nn.Parameter(torch.randn(1, 197, 384))
    network.layers = nn.Sequential(*[_Layer(384, 6) for _ in range(6)])
    network.head = nn.Linear(384, 1000)
    return network


class WideUNet(UNet):
    """The tests' denoiser, sixteen times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 256), nn.SiLU(), nn.Linear(256, 256))
        self.enter, self.down = nn.Conv2d(3, 128, 3, 1, 1), nn.Conv2d(128, 256, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(32, 256), nn.Conv2d(256, 256, 3, 1, 1)
        self.attention = _Attention(256, 4)
        self.up, self.leave = nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.Conv2d(256, 3, 3, 1, 1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "resnet": (resnet18, lambda: (torch.randn(BATCH, 3, 224, 224),)),
    "vit": (vit_small, lambda: (torch.randn(BATCH, 3, 224, 224),)),
    "unet": (WideUNet, lambda: (torch.randn(BATCH, 3, 32, 32), torch.randint(0, 1000, (BATCH,)))),
}


def seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def measure(name: str, rounds: int) -> tuple[float, float]:
    """The ratios of forward, and of forward and backward."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name][0]().eval(), NETWORKS[name][1]()
    times: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:  # parameters are read when they are first needed
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, inputs, path, dynamo=True, opset_version=21, optimize=False, verbose=False)
        graph = TorchGraph(load(path))
        trained = {name for name, _ in network.named_parameters()}
        graph.trainable(name for name in graph.model.graph.initializers if name in trained)
        torch.testing.assert_close(graph(*inputs)[0], network(*inputs), rtol=1e-3, atol=1e-3)
        runs: dict[str, Callable[[], Tensor]] = {"eager": lambda: network(*inputs), "graph": lambda: graph(*inputs)[0]}
        backward: dict[str, Callable[[], None]] = {
            "eager": lambda: network(*inputs).square().mean().backward(),
            "graph": lambda: graph(*inputs)[0].square().mean().backward(),
        }
        for _ in range(rounds):
            for who, run in runs.items():
                with torch.no_grad():
                    times.setdefault((who, False), []).append(seconds(run))
                times.setdefault((who, True), []).append(seconds(backward[who]))
    middle = {key: statistics.median(values) for key, values in times.items()}
    return middle["graph", False] / middle["eager", False], middle["graph", True] / middle["eager", True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"{'network':10}{'forward':>10}{'and backward':>14}   ratios of processor time, interpreter / eager")
    for name in options.networks.split(","):
        forward, both = measure(name, options.rounds)
        print(f"{name:10}{forward:10.2f}{both:14.2f}", flush=True)


if __name__ == "__main__":
    main()
