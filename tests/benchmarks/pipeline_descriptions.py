"""Pipelines of diffusers for `pipelines.py`: small random networks, and the schedules of the published models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from denoiser_architectures import DENOISERS, FLUX, UNET

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline", "network": ("UNet2DConditionModel", UNET),
    "call": {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "height": 128, "width": 128},
    "parts": ("tokenizer", "safety_checker", "feature_extractor"),
}  # fmt: skip
SIDES = {"height": 128, "width": 128}
FLOW = "FlowMatchEulerDiscreteScheduler"
SHIFTED = {
    "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
TEXT = {"prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.int64)}
LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
    "extra_pos_embed_type": None,
}  # fmt: skip
VIDEO = SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "num_frames": 5}
SOLVED_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEO: dict[str, Any] = {
    "pipeline": "CogVideoXPipeline",
    "network": ("CogVideoXTransformer3DModel", DENOISERS["CogVideoX"][1] | {"sample_width": 16, "sample_height": 16}),
    "call": VIDEO,
    "parts": ("text_encoder", "tokenizer"),
}
COGVIDEO_SCHEDULE = BETAS | {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False,
}  # fmt: skip


class Part(SimpleNamespace):
    """What pipelines ask for more than parts that are None: sizes in configurations, mostly."""

    def to(self, *_: Any) -> Part:
        return self


def without_guidance() -> Any:
    """The object that some pipelines ask how to guide."""
    from diffusers import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=1.0, enabled=False)


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
        "schedule": (FLOW, {"shift": 3.0}),
    },
    "FLUX.1 dev": flux(guided=True) | {
        "schedule": (FLOW, SHIFTED),
    },
    "FLUX.1 schnell": flux(guided=False) | {"schedule": (FLOW, {"shift": 1.0})},
    "FLUX.2": {
        "pipeline": "Flux2Pipeline",
        "network": ("Flux2Transformer2DModel", FLUX | {
            "in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 3.5},
        "parts": ("text_encoder", "tokenizer"),
        "grid": (8, 8),
        "schedule": (FLOW, {"use_dynamic_shifting": True, "shift": 3.0}),
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
        "schedule": (FLOW, {"shift": 1.73}),
    },
    "Sana": {
        "pipeline": "SanaPipeline",
        "network": ("SanaTransformer2DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
            "caption_channels": 32, "sample_size": 16, "patch_size": 1,
        }),
        "call": TEXT | {
            "guidance_scale": 1.0,
            "height": 512, "width": 512, "use_resolution_binning": False,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("DPMSolverMultistepScheduler", SOLVED_FLOW | {"flow_shift": 3.0}),
    },
    "CogVideoX": COGVIDEO | {"schedule": ("CogVideoXDDIMScheduler", COGVIDEO_SCHEDULE)},
    "Chroma": {
        "pipeline": "ChromaPipeline",
        "network": ("ChromaTransformer2DModel", DENOISERS["Chroma"][1] | {"in_channels": 16, "patch_size": 1}),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), np.float32), "guidance_scale": 1.0,
            "negative_prompt_embeds": (1, 7, 32), "negative_prompt_attention_mask": np.ones((1, 7), np.float32),
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {"use_dynamic_shifting": True}),
    },
    "Wan": {
        "pipeline": "WanPipeline",
        "network": ("WanTransformer3DModel", WAN),
        "call": VIDEO,
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("UniPCMultistepScheduler", SOLVED_FLOW | {"flow_shift": 3.0}),
    },
    "LTX Video": {
        "pipeline": "LTXPipeline",
        "network": ("LTXVideoTransformer3DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "cross_attention_dim": 32, "caption_channels": 32,
        }),
        "call": SIDES | TEXT | {
            "guidance_scale": 1.0,
            "num_frames": 9,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {
            "use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.95, "max_shift": 2.05,
            "base_image_seq_len": 1024, "max_image_seq_len": 4096, "shift_terminal": 0.1,
        }),
    },
    "CogVideoX 5B's schedule": COGVIDEO | {"schedule": ("CogVideoXDPMScheduler", COGVIDEO_SCHEDULE)},
    "CogView4": {
        "pipeline": "CogView4Pipeline",
        "network": ("CogView4Transformer2DModel", {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 16, "rope_axes_dim": (16, 16),
        }),
        "call": SIDES | {"prompt_embeds": (1, 16, 32), "guidance_scale": 1.0},
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {
            "use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "shift": 1.0,
            "time_shift_type": "linear",
        }),
    },
    "PRX": {
        "pipeline": "PRXPipeline",
        "network": ("PRXTransformer2DModel", {
            "in_channels": 16, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": (8, 8),
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), bool), "guidance_scale": 1.0,
            "use_resolution_binning": False,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {"shift": 3.0}),
    },
    "Krea 2": {
        "pipeline": "Krea2Pipeline",
        "network": ("Krea2Transformer2DModel", {
            "in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 32, "text_hidden_dim": 32,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 64, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 2, 32), "prompt_embeds_mask": np.ones((1, 7), bool), "guidance_scale": 0.0,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, SHIFTED),
    },
    "Bria": {
        "pipeline": "BriaPipeline",
        "network": ("BriaTransformer2DModel", {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
        }),
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0},
        "parts": ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"),
        "made": {"vae": Part(
            config=Part(shift_factor=0, block_out_channels=(1, 1, 1, 1)), dtype=None,
        )},
        "schedule": (FLOW, SHIFTED),
    },
    "Ernie Image": {
        "pipeline": "ErnieImagePipeline",
        "network": ("ErnieImageTransformer2DModel", {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 64, "in_channels": 16,
            "out_channels": 16, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6),
        }),
        "call": SIDES | {"prompt_embeds": [(7, 32)], "guidance_scale": 1.0},
        "parts": ("text_encoder", "tokenizer", "pe", "pe_tokenizer"),
        "schedule": (FLOW, {"shift": 4.0}),
    },
    "Qwen-Image": {
        "pipeline": "QwenImagePipeline",
        "network": ("QwenImageTransformer2DModel", {
            "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4),
        }),
        "stand_in": {"rate": 1000.0},
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_embeds_mask": np.ones((1, 7), np.int64), "true_cfg_scale": 1.0,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, SHIFTED | {
            "max_shift": 0.9, "max_image_seq_len": 8192, "shift": 1.0, "shift_terminal": 0.02,
        }),
    },
    "HunyuanImage": {
        "pipeline": "HunyuanImagePipeline",
        "network": ("HunyuanImageTransformer2DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "guidance_embeds": True, "text_embed_dim": 32,
            "text_embed_2_dim": 32, "rope_axes_dim": (8, 8),
        }),
        "stand_in": {},
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_embeds_mask": np.ones((1, 7), np.int64),
            "prompt_embeds_2": (1, 7, 32), "prompt_embeds_mask_2": np.ones((1, 7), np.int64),
        },
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "schedule": (FLOW, {"shift": 5.0}),
    },
    "Lumina 2": {
        "pipeline": "Lumina2Pipeline",
        "network": ("Lumina2Transformer2DModel", {
            "sample_size": 16, "in_channels": 4, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8),
            "axes_lens": (64, 64, 64), "cap_feat_dim": 32,
        }),
        "stand_in": {},
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), bool), "guidance_scale": 1.0,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {"shift": 6.0}),
    },
    "Lumina Next": {
        "pipeline": "LuminaPipeline",
        "network": ("LuminaNextDiT2DModel", {
            "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2,
            "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 32,
        }),
        "stand_in": {"copies": 2},
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), bool), "guidance_scale": 1.0,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {"shift": 1.0}),
    },
    "Z-Image": {
        "pipeline": "ZImagePipeline",
        "network": ("ZImageTransformer2DModel", {
            "in_channels": 16, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32],
        }),
        "stand_in": {"rate": 1000.0},
        "call": SIDES | {"prompt_embeds": [(7, 32)], "guidance_scale": 0.0},
        "parts": ("text_encoder", "tokenizer"),
        "latents": (16, 16, 16),
        "schedule": (FLOW, {"shift": 3.0}),
    },
    "HiDream": {
        "pipeline": "HiDreamImagePipeline",
        "network": ("HiDreamImageTransformer2DModel", {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [32, 32], "text_emb_dim": 64,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16), "llama_layers": [0, 1],
        }),
        "stand_in": {},
        "call": SIDES | {
            "prompt_embeds_t5": (1, 7, 32), "prompt_embeds_llama3": (2, 1, 7, 32), "pooled_prompt_embeds": (1, 64),
            "guidance_scale": 1.0,
        },
        "parts": (
            "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
            "text_encoder_4", "tokenizer_4",
        ),
        "schedule": (FLOW, {"shift": 3.0}),
    },
    "PixArt": {
        "pipeline": "PixArtAlphaPipeline",
        "network": ("PixArtTransformer2DModel", {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 1,
            "cross_attention_dim": 32, "sample_size": 16, "caption_channels": 32, "use_additional_conditions": False,
        }),
        "stand_in": {"copies": 2},
        "call": SIDES | TEXT | {"guidance_scale": 1.0, "negative_prompt": None, "use_resolution_binning": False},
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("DPMSolverMultistepScheduler", LINEAR_BETAS),
    },
    "Latte": {
        "pipeline": "LattePipeline",
        "network": ("LatteTransformer3DModel", {
            "sample_size": 16, "num_layers": 1, "patch_size": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 32, "out_channels": 8,
            "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 2,
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32),
            "guidance_scale": 1.0, "video_length": 2, "negative_prompt": None, "clean_caption": False,
            "mask_feature": False,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("DDIMScheduler", LINEAR_BETAS | {"clip_sample": False}),
    },
    "Allegro": {
        "pipeline": "AllegroPipeline",
        "network": ("AllegroTransformer3DModel", {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "cross_attention_dim": 24, "sample_width": 16, "sample_height": 16, "sample_frames": 2,
            "caption_channels": 32,
        }),
        "stand_in": {},
        "call": SIDES | TEXT | {
            "guidance_scale": 1.0, "num_frames": 8, "negative_prompt": None, "clean_caption": False,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("EulerAncestralDiscreteScheduler", LINEAR_BETAS | {"timestep_spacing": "linspace"}),
    },
    "HunyuanVideo": {
        "pipeline": "HunyuanVideoPipeline",
        "network": ("HunyuanVideoTransformer3DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 32, "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6),
        }),
        "stand_in": {},
        "call": SIDES | TEXT | {"pooled_prompt_embeds": (1, 32), "guidance_scale": 3.5, "num_frames": 5},
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "schedule": (FLOW, {"shift": 7.0}),
    },
    "HunyuanVideo 1.5": {
        "pipeline": "HunyuanVideo15Pipeline",
        "network": ("HunyuanVideo15Transformer3DModel", {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "text_embed_dim": 32, "text_embed_2_dim": 32,
            "image_embed_dim": 12, "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
        }),
        "stand_in": {"channels": 4},
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_embeds_mask": np.ones((1, 7), np.int64),
            "prompt_embeds_2": (1, 7, 32), "prompt_embeds_mask_2": np.ones((1, 7), np.int64), "num_frames": 5,
        },
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "made": {
            "vae": Part(
                temporal_compression_ratio=4, spatial_compression_ratio=16, config=Part(latent_channels=4)
            ),
            "guider": without_guidance(),
        },
        "schedule": (FLOW, {"shift": 7.0}),
    },
    "Mochi": {
        "pipeline": "MochiPipeline",
        "network": ("MochiTransformer3DModel", {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "pooled_projection_dim": 32, "in_channels": 4, "text_embed_dim": 32, "time_embed_dim": 16,
            "max_sequence_length": 7,
        }),
        "call": SIDES | {
            "prompt_embeds": (1, 7, 32), "prompt_attention_mask": np.ones((1, 7), bool), "guidance_scale": 1.0,
            "num_frames": 7,
        },
        "parts": ("text_encoder", "tokenizer"),
        "schedule": (FLOW, {"invert_sigmas": True, "shift": 1.0}),
    },
    "Cosmos 1": {
        "pipeline": "CosmosTextToWorldPipeline",
        "network": ("CosmosTransformer3DModel", COSMOS),
        "stand_in": {},
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0, "num_frames": 9},
        "parts": ("text_encoder", "tokenizer"),
        "made": {"safety_checker": Part()},
        "schedule": ("EDMEulerScheduler", {
            "sigma_min": 0.002, "sigma_max": 80, "sigma_data": 0.5, "sigma_schedule": "karras",
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0, "final_sigmas_type": "sigma_min",
        }),
    },
    "Cosmos 2": {
        "pipeline": "Cosmos2TextToImagePipeline",
        "network": ("CosmosTransformer3DModel", COSMOS),
        "stand_in": {},
        "call": SIDES | {"prompt_embeds": (1, 7, 32), "guidance_scale": 1.0},
        "parts": ("text_encoder", "tokenizer"),
        "made": {"safety_checker": Part()},
        "schedule": (FLOW, {"use_karras_sigmas": True}),
    },
    "SkyReels V2": {
        "pipeline": "SkyReelsV2Pipeline",
        "network": ("SkyReelsV2Transformer3DModel", WAN | {"cross_attn_norm": True}),
        "call": VIDEO,
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("UniPCMultistepScheduler", SOLVED_FLOW | {"flow_shift": 8.0}),
    },
    "Sana Video": {
        "pipeline": "SanaVideoPipeline",
        "network": ("SanaVideoTransformer3DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
            "caption_channels": 32, "sample_size": 16, "patch_size": (1, 2, 2), "rope_max_seq_len": 32,
        }),
        "call": SIDES | TEXT | {"guidance_scale": 1.0, "frames": 5, "use_resolution_binning": False},
        "parts": ("text_encoder", "tokenizer"),
        "schedule": ("DPMSolverMultistepScheduler", SOLVED_FLOW | {"flow_shift": 8.0}),
    },
    "Motif Video": {
        "pipeline": "MotifVideoPipeline",
        "network": ("MotifVideoTransformer3DModel", {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_decoder_layers": 0, "mlp_ratio": 2.0, "patch_size": 2, "text_embed_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        }),
        "call": SIDES | TEXT | {"num_frames": 5},
        "parts": ("text_encoder", "tokenizer", "feature_extractor"),
        "made": {
            "vae": Part(
                config=Part(z_dim=4, scale_factor_temporal=4, scale_factor_spatial=8)
            ),
            "guider": without_guidance(),
        },
        "schedule": (FLOW, {"shift": 15.0}),
    },
    "EasyAnimate": {
        "pipeline": "EasyAnimatePipeline",
        "network": ("EasyAnimateTransformer3DModel", {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 1, "mmdit_layers": 1, "sample_width": 16,
            "sample_height": 16, "patch_size": 2, "add_norm_text_encoder": True,
        }),
        "call": SIDES | TEXT | {"guidance_scale": 1.0, "num_frames": 5},
        "parts": ("text_encoder", "tokenizer"),
        "made": {"vae": Part(
            spatial_compression_ratio=8, temporal_compression_ratio=4, config=Part(latent_channels=4)
        )},
        "schedule": (FLOW, {"use_dynamic_shifting": True}),
    },
    "Kandinsky 5": {
        "pipeline": "Kandinsky5T2VPipeline",
        "network": ("Kandinsky5Transformer3DModel", {
            "in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32, "out_visual_dim": 4,
            "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6), "visual_cond": False,
        }),
        "call": SIDES | {
            "prompt_embeds_qwen": (1, 7, 32), "prompt_embeds_clip": (1, 32),
            "prompt_cu_seqlens": np.array([0, 7], np.int32), "guidance_scale": 1.0, "num_frames": 5,
        },
        "parts": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "schedule": (FLOW, {"shift": 10.0}),
    },
}  # fmt: skip
