"""Pipelines of diffusers beside our sampler: what the network is told in each step, and where the samples arrive.

    pip install diffusers transformers
    python tests/benchmarks/pipelines.py --out pipelines

Networks are small and random, schedules are those that the models are published with. A pipeline runs from given noise;
its network is exported, laid down with `config.json` and `scheduler/scheduler_config.json` as exporters do, found again
by path alone, and sampled from the same noise in onnxruntime. The last column is the SQNR between both results.
"""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from denoiser_architectures import DENOISERS, FLUX, UNET

STEPS = 6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline", "network": ("UNet2DConditionModel", UNET),
    "call": {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "height": 128, "width": 128},
    "parts": ("tokenizer", "safety_checker", "feature_extractor"),
}  # fmt: skip
SIDES = {"height": 128, "width": 128}


def flux(*, guided: bool) -> dict[str, Any]:
    """FLUX.1, which is told its guidance or was distilled to need none."""
    return {
        "pipeline": "FluxPipeline",
        "network": ("FluxTransformer2DModel", FLUX | {
            "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": guided, "patch_size": 1,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "pooled_prompt_embeds": (1, 32)},
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    }  # fmt: skip


# By name: the pipeline, its network, what it is called with (shapes of random tensors, or the arguments themselves),
# the schedule: the scheduler, and its configuration; and the grid of tokens where the pipeline takes noise before it
# becomes tokens.
PIPELINES: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": SD | {
        "schedule": ("PNDMScheduler", BETAS | {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    },
    "Stable Diffusion 2.1": SD | {
        "schedule": ("DDIMScheduler", BETAS | {
            "prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
        }),
    },
    "SDXL's schedule": SD | {
        "schedule": ("EulerDiscreteScheduler", BETAS | {"steps_offset": 1, "timestep_spacing": "leading"}),
    },
    "Karras sigmas": SD | {"schedule": ("DPMSolverMultistepScheduler", BETAS | {"use_karras_sigmas": True})},
    "DEIS": SD | {"schedule": ("DEISMultistepScheduler", BETAS)},
    "KDPM2": SD | {"schedule": ("KDPM2DiscreteScheduler", BETAS)},
    "UniPC": SD | {"schedule": ("UniPCMultistepScheduler", BETAS)},
    "Playground 2.5's schedule": SD | {"schedule": ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5})},
    "Stable Diffusion 3": {
        "pipeline": "StableDiffusion3Pipeline",
        "network": ("SD3Transformer2DModel", {
            "sample_size": 16, "in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32, "out_channels": 4,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "pooled_prompt_embeds": (1, 32), "guidance_scale": 1.0},
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        "schedule": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    },
    "FLUX.1 dev": flux(guided=True) | {
        "schedule": ("FlowMatchEulerDiscreteScheduler", {
            "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15,
            "base_image_seq_len": 256, "max_image_seq_len": 4096,
        }),
    },
    "FLUX.1 schnell": flux(guided=False) | {"schedule": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0})},
    "FLUX.2": {
        "pipeline": "Flux2Pipeline",
        "network": ("Flux2Transformer2DModel", FLUX | {
            "in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 3.5},
        "parts": ("text_encoder", "tokenizer"),
        "grid": (8, 8),
        "schedule": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0}),
    },
    "AuraFlow": {
        "pipeline": "AuraFlowPipeline",
        "network": ("AuraFlowTransformer2DModel", {
            "sample_size": 16, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 256,
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.float32), "guidance_scale": 1.0,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.73}),
    },
    "Sana": {
        "pipeline": "SanaPipeline",
        "network": ("SanaTransformer2DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
            "caption_channels": 32, "sample_size": 16, "patch_size": 1,
        }),
        "call": {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.int64), "guidance_scale": 1.0,
            "height": 512, "width": 512, "use_resolution_binning": False,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("DPMSolverMultistepScheduler", {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
        }),
    },
    "CogVideoX": {
        "pipeline": "CogVideoXPipeline",
        "network": ("CogVideoXTransformer3DModel", DENOISERS["CogVideoX"][1] | {
            "sample_width": 16, "sample_height": 16,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "num_frames": 5},
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("CogVideoXDDIMScheduler", BETAS | {
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False,
        }),
    },
    "Chroma": {
        "pipeline": "ChromaPipeline",
        "network": ("ChromaTransformer2DModel", DENOISERS["Chroma"][1] | {"in_channels": 16, "patch_size": 1}),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.float32), "guidance_scale": 1.0,
            "negative_prompt_embeds": (1, 7, 32), "negative_prompt_attention_mask": np.ones((1, 7), np.float32),
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    },
    "Wan": {
        "pipeline": "WanPipeline",
        "network": ("WanTransformer3DModel", {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "num_frames": 5},
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("UniPCMultistepScheduler", {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
        }),
    },
    "LTX Video": {
        "pipeline": "LTXPipeline",
        "network": ("LTXVideoTransformer3DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "cross_attention_dim": 32, "caption_channels": 32,
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.int64), "guidance_scale": 1.0,
            "num_frames": 9,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("FlowMatchEulerDiscreteScheduler", {
            "use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.95, "max_shift": 2.05,
            "base_image_seq_len": 1024, "max_image_seq_len": 4096, "shift_terminal": 0.1,
        }),
    },
}  # fmt: skip


def measure(name: str, folder: Path) -> str:
    """What the network was told by both, and how far the results are apart."""
    import diffusers
    import torch

    from onnxq import model as models
    from onnxq.config import make_settings
    from onnxq.diffusion.source import open_sampler
    from onnxq.runtime import Session

    torch.manual_seed(0)
    described = PIPELINES[name]
    kind, config = described["network"]
    network = getattr(diffusers, kind)(**config).eval()
    for parameter in network.parameters():
        if parameter.numel() and not parameter.any():  # ends that start as zero: predictions would be nothing
            torch.nn.init.normal_(parameter, std=0.02)
    scheduler = getattr(diffusers, described["schedule"][0])(**described["schedule"][1])
    takes = inspect.signature(getattr(diffusers, described["pipeline"]).__init__).parameters
    parts = dict.fromkeys(("vae", "text_encoder", *described["parts"]))
    parts |= {"transformer" if "transformer" in takes else "unet": network, "scheduler": scheduler}
    pipeline = getattr(diffusers, described["pipeline"])(**{key: parts[key] for key in parts if key in takes})
    pipeline.set_progress_bar_config(disable=True)
    call = {
        key: torch.randn(item)
        if isinstance(item, tuple)
        else torch.from_numpy(item)
        if hasattr(item, "dtype")
        else item
        for key, item in described["call"].items()
    }
    call |= {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    seen: list[dict[str, Any]] = []
    names = list(inspect.signature(network.forward).parameters)

    def note(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(names, positional, strict=False)) | named
        seen.append({key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in given.items()})

    network.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        pipeline(**call)
    told_name = next(key for key in seen[0] if key.startswith("timestep"))
    # Masks are as good as constant, and some networks ask for their sums.
    inputs = {
        key: item for key, item in seen[0].items()
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or key == told_name)
    }  # fmt: skip
    fixed = {key: item for key, item in seen[0].items() if key not in inputs and key != "return_dict"}
    sample = next(iter(inputs))
    place = folder / name.replace(" ", "_").replace("'", "")
    path = place / "network" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    export(network, inputs, fixed, path)
    (path.parent / "config.json").write_text(json.dumps({"_class_name": kind}))
    scheduler.save_pretrained(place / "scheduler")
    by_itself = (sample, told_name, "guidance", "img_ids", "txt_ids")
    conditions = {key: value.numpy() for key, value in inputs.items() if key not in by_itself}
    np.savez(place / "conditions.npz", **conditions)
    settings = make_settings({"steps": STEPS, "conditions": str(place / "conditions.npz")})
    sampler, line = open_sampler(models.load(path), path, settings)
    assert str(place) in line, line
    run = sampler.run(Session(path), [0])
    noise = torch.from_numpy(np.random.default_rng([0, 0]).standard_normal(sampler.denoiser.noise_shape, np.float32))
    if "grid" in described:
        noise = noise.T.reshape(-1, *described["grid"])
    seen.clear()
    with torch.no_grad():
        wanted = pipeline(**call, latents=noise[None])[0].numpy()
    told = [float(item[told_name].reshape(-1)[0]) for item in seen]
    ours = [float(visit.feed[sampler.denoiser.timestep.name].reshape(-1)[0]) for visit in run]
    apart = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(told, ours, strict=True))
    found = run.sample.reshape(-1)
    wanted = wanted.reshape(-1)
    ratio = 10 * np.log10(np.mean(wanted**2) / max(np.mean((wanted - found) ** 2), 1e-30))
    shown = ", ".join(f"{time:.4g}" for time in told)
    return f"told {shown}; ours apart by {apart:.1e} at most; result {ratio:.1f} dB"


def export(network: Any, inputs: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    """Write the network with the inputs that a pipeline gives it; what is fixed becomes part of the graph."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Any) -> Any:
            return self.network(**dict(zip(inputs, values, strict=True)), **fixed, return_dict=False)[0]

    torch.onnx.export(
        Called().eval(), tuple(inputs.values()), path, dynamo=True, input_names=list(inputs), opset_version=21,
        external_data=False, verbose=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipelines"))
    parser.add_argument("--names", nargs="*", default=list(PIPELINES), choices=list(PIPELINES), metavar="NAME")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in arguments.names:
        try:
            print(f"{name:26} {measure(name, arguments.out)}", flush=True)
        except Exception as error:  # noqa: BLE001 - one that fails is a row, not the end
            print(f"{name:26} {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
