"""Denoisers of diffusers, without data, through every recipe for denoisers: what each step keeps, what refuses.

    pip install diffusers transformers
    python tests/benchmarks/denoiser_architectures.py --out denoisers --build 89

Weights are random, and so are conditions, so SQNR tells a wrong placement or scale from a right one, not how good
images are. Learning is cut to a few steps: what counts is whether it runs. Started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from architectures import built, quality, run

from onnxq import targets

ROWS = 8
LEARNING = ("--set", "iterations=2")
RECIPES: dict[str, tuple[str, ...]] = {
    **{f"int8 {target}": ("--target", target) for target in targets.names()},
    "ptq4dm": ("--recipe", "ptq4dm"),
    "q-diffusion": ("--recipe", "q-diffusion", *LEARNING),
    "tfmq-dm": ("--recipe", "tfmq-dm", *LEARNING),
    "apq-dm": ("--recipe", "apq-dm", "--set", "groups=2", *LEARNING),
    "ptqd": ("--recipe", "ptqd", "--set", "base=int8"),
    "q-dm": ("--recipe", "q-dm", "--set", "steps=3"),
    "diffusion": ("--recipe", "diffusion", "--weights", "int4", *LEARNING),
}
Shape = tuple[int, ...]
LATENT: Shape = (2, 4, 16, 16)
VIDEO: Shape = (2, 4, 2, 16, 16)
TEXT: Shape = (2, 7, 32)
UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
# By name: the class, its configuration, and its inputs: shapes of random ones, or the numbers themselves.
DENOISERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Stable Diffusion": ("UNet2DConditionModel", UNET, {"sample": LATENT, "encoder_hidden_states": TEXT}),
    "inpainting": (
        "UNet2DConditionModel", UNET | {"in_channels": 9}, {"sample": (2, 9, 16, 16), "encoder_hidden_states": TEXT},
    ),
    "DeepFloyd": (
        "UNet2DConditionModel",
        UNET | {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "attention_head_dim": 16,
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "act_fn": "gelu",
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift",
        },
        {"sample": LATENT, "encoder_hidden_states": TEXT},
    ),
    "Stable Video Diffusion": (
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 16, "block_out_channels": (32, 64), "cross_attention_dim": 32, "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "num_frames": 2,
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_attention_heads": (2, 4), "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48,
        },
        {
            "sample": (2, 2, 8, 16, 16), "encoder_hidden_states": (2, 1, 32),
            "added_time_ids": np.float32([[6, 127, 0.02]] * 2),
        },
    ),
    "Stable Cascade": (
        "StableCascadeUNet",
        {
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16, "conditioning_dim": 32,
            "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32,
        },
        {
            "sample": LATENT, "timestep_ratio": np.float32([0.1, 0.9]), "clip_text_pooled": (2, 1, 32),
            "clip_text": TEXT,
        },
    ),
    "Kandinsky 3": (
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2,
            "block_out_channels": (16, 16), "cross_attention_dim": 32, "encoder_hid_dim": 32,
        },
        {"sample": LATENT, "encoder_hidden_states": TEXT, "encoder_attention_mask": np.ones((2, 7), np.float32)},
    ),
    "AudioLDM 2": (
        "AudioLDM2UNet2DConditionModel",
        UNET | {"cross_attention_dim": (32, 32), "in_channels": 4, "out_channels": 4, "attention_head_dim": 8},
        {"sample": LATENT, "encoder_hidden_states": TEXT, "encoder_hidden_states_1": (2, 5, 32)},
    ),
    "Stable Audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 16,
            "global_states_input_dim": 32, "cross_attention_input_dim": 32,
        },
        {
            "hidden_states": (2, 4, 16), "timestep": np.float32([0.1, 0.5]), "encoder_hidden_states": TEXT,
            "global_hidden_states": (2, 1, 32),
        },
    ),
    "unCLIP prior": (
        "PriorTransformer",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 32,
            "num_embeddings": 7, "additional_embeddings": 4,
        },
        {"hidden_states": (2, 32), "proj_embedding": (2, 32), "encoder_hidden_states": TEXT},
    ),
    "PRX": (
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
            "axes_dim": [8, 8],
        },
        {"hidden_states": LATENT, "timestep": np.float32([0.1, 0.5]), "encoder_hidden_states": TEXT},
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 5, "max_text_seq_length": 7,
        },
        {"hidden_states": (2, 2, 4, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        FLUX | {
            "in_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        {
            "hidden_states": (2, 16, 4), "timestep": np.float32([0.1, 0.5]), "encoder_hidden_states": TEXT,
            "txt_ids": np.zeros((7, 3), np.float32),
            "img_ids": np.float32([[0, y, x] for y in range(4) for x in range(4)]),
        },
    ),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        FLUX | {
            "in_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        },
        {
            "hidden_states": (2, 16, 4), "timestep": np.float32([0.1, 0.5]), "encoder_hidden_states": TEXT,
            "txt_ids": np.zeros((7, 4), np.float32), "guidance": np.ones(2, np.float32),
            "img_ids": np.float32([[0, y, x, 0] for y in range(4) for x in range(4)]),
        },
    ),
}  # fmt: skip


def export(name: str, path: Path) -> None:
    """Write the network, and rows for its conditions; runs in a process of its own."""
    import diffusers
    import torch

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    kind, config, described = DENOISERS[name]
    network = getattr(diffusers, kind)(**config).eval()
    for parameter in network.parameters():
        if parameter.numel() and not parameter.any():  # ends that start as zero: what is before them would not matter
            torch.nn.init.normal_(parameter, std=0.02)
    described = (
        described if any("timestep" in key for key in described) else described | {"timestep": np.array([10, 500])}
    )
    inputs = {
        key: torch.from_numpy(item) if isinstance(item, np.ndarray) else torch.randn(item)
        for key, item in described.items()
    }

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Any) -> Any:
            return self.network(**dict(zip(inputs, values, strict=True)), return_dict=False)[0]

    torch.onnx.export(
        Called().eval(), tuple(inputs.values()), path, dynamo=True, input_names=list(inputs), opset_version=21,
        external_data=False, verbose=False,
    )  # fmt: skip
    sample, *others = inputs
    conditions = {
        key: inputs[key].numpy() if isinstance(described[key], np.ndarray) else rows(described[key])
        for key in others
        if "timestep" not in key
    }
    shape = inputs[sample].shape
    with torch.no_grad():
        predicted = network(**inputs, return_dict=False)[0].shape
    for axis in (axis for axis in range(len(shape)) if predicted[axis] < shape[axis]):
        beside = [shape[axis] - predicted[axis] if index == axis else size for index, size in enumerate(shape)]
        conditions[f"{sample}.behind"] = rows(beside)
    np.savez(path.with_suffix(".npz"), **conditions)


def rows(shape: Any) -> np.ndarray:
    """Random rows."""
    return np.random.default_rng(0).standard_normal((ROWS, *shape[1:])).astype(np.float32)


def measure(folder: Path, name: str, sm: str | None) -> dict[str, str]:
    """A cell for each recipe, and one for the engine."""
    path = folder / f"{name.replace(' ', '_')}.onnx"
    if not path.is_file():
        code, error = run(__file__, "--export", name, "--out", str(path))
        if code or not path.is_file():
            return {"export": error or "no file"}
    found = {}
    for recipe, options in RECIPES.items():
        result, numbers = path.with_suffix(f".{recipe.replace(' ', '.')}.onnx"), path.with_suffix(".json")
        code, error = run(
            "-m", "onnxq.cli", "quantize", str(path), "--conditions", str(path.with_suffix(".npz")), "--steps", "6",
            "--samples", "12", "-o", str(result), "-q", "--json", str(numbers), *options,
        )  # fmt: skip
        if code:
            found[recipe] = error
            continue
        found[recipe] = quality(json.loads(numbers.read_text()))
        if recipe == "int8 tensorrt" and sm is not None:
            found["engine"] = built(result, path, sm)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("denoisers"))
    parser.add_argument("--names", nargs="*", default=list(DENOISERS), choices=list(DENOISERS), metavar="NAME")
    parser.add_argument("--build", metavar="SM", help="compile an engine for this architecture, too")
    parser.add_argument("--export", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.export, arguments.out)
        return
    arguments.out.mkdir(exist_ok=True, parents=True)
    kept = arguments.out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in arguments.names:
        if name not in results:
            results[name] = measure(arguments.out, name, arguments.build)
            kept.write_text(json.dumps(results, indent=1))
        print(name)
        for recipe, cell in results[name].items():
            print(f"  {recipe:16} {cell[:140]}", flush=True)


if __name__ == "__main__":
    main()
