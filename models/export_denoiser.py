#!/usr/bin/env python3
"""Export a denoiser of the package diffusers to ONNX, with its schedule in the model's metadata.

    python models/export_denoiser.py FOLDER -o denoiser.onnx [--size 64] [--tokens 77]

FOLDER holds a pipeline as diffusers saves it (`unet` or `transformer`, and `scheduler`). The model's inputs are
`sample` [batch, channels, size, size], `timestep` float [batch], and, where the network is conditioned on text,
`encoder_hidden_states` [batch, tokens, width], or, on classes, `class_labels` [batch]. The output is `prediction`.

GroupNorm and Gelu stay single nodes (opset 21), and the batch is free. The file is compared with torch in
onnxruntime before it is written; what it is compared on are random inputs of batch 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxq import model as models
from onnxq import writing
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

TOLERANCE = 2e-3  # of the largest value: sums of float32 in another order


class Positional(torch.nn.Module):
    """The network with plain tensors in and one plain tensor out."""

    def __init__(self, network: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        """The prediction."""
        first = "hidden_states" if "Transformer" in type(self.network).__name__ else "sample"
        given: dict[str, Any] = {first: sample, "timestep": timestep, **dict(zip(self.names, conditions, strict=True))}
        return self.network(**given, return_dict=False)[0]


def export(network: torch.nn.Module, scheduler: dict[str, Any], output: Path, size: int, tokens: int) -> None:
    """Write the network as ONNX, whole or not at all.

    Args:
        network: A UNet or transformer of diffusers.
        scheduler: Its scheduler's configuration.
        output: The file.
        size: Height and width of the sample.
        tokens: Length of the text that the network is conditioned on, if it is.

    Raises:
        OnnxqError: the exported model does not compute what torch does.
    """
    writing.check_writable(output)
    config = network.config
    names, shapes = [], []
    width = getattr(config, "cross_attention_dim", None)
    is_unconditional = type(network).__name__ == "UNet2DModel"
    if width and not is_unconditional:
        names.append("encoder_hidden_states")
        shapes.append((tokens, width))
    embeds = getattr(config, "class_embed_type", None) is not None or getattr(config, "num_class_embeds", None)
    if embeds or getattr(config, "norm_type", "") == "ada_norm_zero":
        names.append("class_labels")
        shapes.append(())
    wrapped = Positional(network.eval(), names)
    arguments = _inputs(2, config.in_channels, size, names, shapes)
    batch = torch.export.Dim("batch", min=1, max=1024)
    free = [{0: batch} for _ in arguments]
    with torch.no_grad():
        program = torch.onnx.export(
            wrapped, tuple(arguments), dynamo=True, opset_version=21, verbose=False,
            input_names=["sample", "timestep", *names], output_names=["prediction"],
            dynamic_shapes=(free[0], free[1], tuple(free[2:])),
        )  # fmt: skip
    assert program is not None
    model = program.model
    for node in model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exports
    models.set_metadata(model, scheduler=json.dumps(scheduler, sort_keys=True))
    with tempfile.TemporaryDirectory() as folder:
        checked = models.save(model, Path(folder) / "model.onnx")
        session = Session(checked)
        for count in (1, 2):
            given = _inputs(count, config.in_channels, size, names, shapes)
            with torch.no_grad():
                expected = wrapped(*given).numpy()
            feed = {name: value.numpy() for name, value in zip(session.input_names, given, strict=True)}
            error = float(np.abs(session.run(feed)[0] - expected).max() / np.abs(expected).max())
            if error > TOLERANCE:
                raise OnnxqError(
                    f"expected what torch computes, found {error:.1e} of the largest value beside it (batch {count})",
                    hint="export with another version of torch, and report it",
                )
    models.save(model, output)


def _inputs(
    count: int, channels: int, size: int, names: list[str], shapes: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    given = [torch.randn(count, channels, size, size, generator=generator), torch.full((count,), 500.0)]
    for name, shape in zip(names, shapes, strict=True):
        if name == "class_labels":
            given.append(torch.arange(count))
        else:
            given.append(torch.randn(count, *shape, generator=generator))
    return given


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", type=int, help="height and width of the sample; the network's own if not given")
    parser.add_argument("--tokens", type=int, default=77)
    arguments = parser.parse_args()
    try:
        part = next((name for name in ("unet", "transformer") if (arguments.folder / name).is_dir()), None)
        config = arguments.folder / "scheduler" / "scheduler_config.json"
        if part is None or not config.is_file():
            raise OnnxqError(
                f"expected a pipeline of diffusers (unet or transformer, and scheduler) in {arguments.folder}",
                hint="save one with pipeline.save_pretrained(FOLDER)",
            )
        import diffusers

        kind = json.loads((arguments.folder / part / "config.json").read_text())["_class_name"]
        network = getattr(diffusers, kind).from_pretrained(arguments.folder / part, torch_dtype=torch.float32)
        size = arguments.size or network.config.sample_size
        export(network, json.loads(config.read_text()), arguments.output, size, arguments.tokens)
    except OnnxqError as error:
        sys.exit(f"error: {error.message}\n  tip: {error.hint}")


if __name__ == "__main__":
    main()
