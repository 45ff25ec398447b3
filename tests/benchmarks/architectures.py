"""Networks that users export, through `onnxq quantize` and `onnxq build`: what is placed, what it costs, what refuses.

    pip install timm torchvision transformers diffusers denoising-diffusion-pytorch monai
    python tests/benchmarks/architectures.py --out architectures --build 89

Weights are random (BatchNormalization remembers one batch), so SQNR tells a wrong placement or scale from a right one,
not how well a trained network keeps its answers. Latencies are those of the `cpu` result over float's, one thread.
Started again, it goes on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import targets

SECONDS = 900  # for each command
ROWS = 8
NAMES = {
    "torchvision": (
        "resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5", "googlenet",
        "convnext_tiny", "swin_t", "vit_b_16", "regnet_y_400mf", "mnasnet0_5", "maxvit_t", "r3d_18",
        "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "swin_v2_t", "vgg11_bn", "efficientnet_v2_s",
    ),
    "timm": (
        "deit_tiny_patch16_224", "mobilevit_xxs", "efficientformer_l1", "levit_128s", "ghostnet_050", "repvgg_a0",
        "fastvit_t8", "edgenext_xx_small", "eva02_tiny_patch14_224", "mobilenetv4_conv_small", "res2net50_14w_8s",
        "poolformer_s12", "hrnet_w18_small", "nfnet_l0", "xcit_nano_12_p16_224", "tiny_vit_5m_224",
        "convnextv2_atto", "mobileone_s0", "repvit_m0_9", "davit_tiny", "cait_xxs24_224", "swinv2_cr_tiny_ns_224",
        "twins_pcpvt_small", "pvt_v2_b0", "focalnet_tiny_srf", "gcvit_xxtiny", "hgnetv2_b0", "efficientvit_b0",
        "efficientvit_m0", "starnet_s1", "vit_small_patch16_dinov3", "resmlp_12_224", "sequencer2d_s", "botnet26t_256",
        "halonet26t", "dpn48b", "cspdarknet53", "tresnet_m", "skresnet18", "resnest14d", "ecaresnet26t", "rexnet_100",
        "mobilevitv2_050", "crossvit_tiny_240", "visformer_tiny", "mambaout_femto", "nextvit_small",
        "inception_next_atto", "hiera_tiny_224", "swiftformer_xs", "fasternet_t0", "shvit_s1", "gmlp_s16_224",
        "mixer_s32_224", "lambda_resnet26t", "vit_tiny_r_s16_p8_224",
    ),
    "transformers": (
        "BertForSequenceClassification", "RobertaForSequenceClassification", "DebertaV2ForSequenceClassification",
        "AlbertForSequenceClassification", "GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM", "GPTNeoXForCausalLM",
        "Olmo2ForCausalLM", "MambaForCausalLM", "WhisperModel", "Wav2Vec2ForCTC", "SegformerForSemanticSegmentation",
        "DistilBertForSequenceClassification", "ElectraForSequenceClassification", "MPNetForSequenceClassification",
        "ModernBertForSequenceClassification", "T5ForConditionalGeneration", "BartForConditionalGeneration",
        "MarianMTModel", "BloomForCausalLM", "FalconForCausalLM", "PhiForCausalLM", "GemmaForCausalLM",
        "Gemma3ForCausalLM", "CohereForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM", "StableLmForCausalLM",
        "Starcoder2ForCausalLM", "HubertForCTC", "WavLMForCTC", "ViTForImageClassification", "Dinov2Model",
        "SiglipVisionModel", "CLIPVisionModel", "CLIPTextModel", "SwinModel", "YolosForObjectDetection",
    ),
    "diffusers": (
        "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel",
        "FluxTransformer2DModel", "WanTransformer3DModel", "AutoencoderKL",
    ),
    "denoising_diffusion_pytorch": ("Unet", "Unet1D", "KarrasUnet"),
    "monai": ("UNETR", "SegResNet", "DynUNet", "ViT", "DiffusionModelUNet", "AutoencoderKL"),
}  # fmt: skip
TEXT = {
    "vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "num_key_value_heads": 2, "head_dim": 32, "n_embd": 128, "n_layer": 2, "n_head": 4, "d_model": 128, "ffn_dim": 256,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_source_positions": 150, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "word_embed_proj_dim": 128, "state_size": 8,
    "conv_dim": (64, 64, 64), "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 128,
}  # fmt: skip
OTHERWISE: dict[str, dict[str, Any]] = {
    "MambaForCausalLM": {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "SegformerForSemanticSegmentation": {},
    "SwinModel": {"image_size": 128, "window_size": 4, "depths": [2, 2], "num_heads": [3, 6]},
    "YolosForObjectDetection": VISION | {"image_size": [128, 128]},
} | dict.fromkeys(("ViTForImageClassification", "Dinov2Model", "SiglipVisionModel", "CLIPVisionModel"), VISION)
Made = tuple[Any, Callable[..., Any], dict[str, Any]]


def of_torchvision(name: str) -> Made:
    import torch
    import torchvision

    video = name.startswith("r3d")
    size = (1, 3, 16, 112, 112) if video else (2, 3, 224, 224)
    if name.startswith(("deeplab", "lraspp")):
        network = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        return network, lambda net, x: net(x)["out"], {"x": torch.randn(size)}
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, **options), lambda net, x: net(x), {"x": torch.randn(size)}


def of_timm(name: str) -> Made:
    import timm
    import torch

    network = timm.create_model(name, pretrained=False, exportable=True)
    side = network.default_cfg["input_size"][-1]
    return network, lambda net, x: net(x), {"x": torch.randn(2, 3, side, side)}


def of_transformers(name: str) -> Made:
    import torch
    import transformers

    kind = getattr(transformers, name)
    known = inspect.signature(kind.config_class.__init__).parameters
    known = {**known, **getattr(kind.config_class, "__annotations__", {})}
    config = kind.config_class(**OTHERWISE.get(name, {key: value for key, value in TEXT.items() if key in known}))
    if "Mamba" not in name and "Deberta" not in name:
        config._attn_implementation = "eager"
    network, main = kind(config), kind.main_input_name
    tokens = torch.randint(3, 900, (2, 32))
    given = {
        "input_ids": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        "pixel_values": {"pixel_values": torch.randn(2, 3, 128, 128)},
        "input_values": {"input_values": torch.randn(2, 4000)},
        "input_features": {"input_features": torch.randn(2, 80, 300)},
    }[main]
    if "Mamba" in name:
        given = {"input_ids": tokens[:, :8]}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens[:, :8].clone()
    cached = {"use_cache": False} if hasattr(config, "use_cache") else {}

    def call(net: Any, *values: Any) -> Any:
        return net(**dict(zip(given, values, strict=True)), **cached, return_dict=False)[0]

    return network, call, given


def of_diffusers(name: str) -> Made:
    import diffusers
    import torch

    sample, time, text, pooled = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([10, 500]),
        torch.randn(2, 7, 32),
        torch.randn(2, 64),
    )
    kind = getattr(diffusers, name)
    if name == "UNet2DModel":
        network = kind(
            sample_size=32, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=8,
        )  # fmt: skip
        return network, lambda net, x, t: net(x, t).sample, {"sample": torch.randn(2, 3, 32, 32), "timestep": time}
    if name == "UNet2DConditionModel":
        network = kind(
            sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, norm_num_groups=8,
            attention_head_dim=4, layers_per_block=1,
        )  # fmt: skip
        inputs = {"sample": sample, "timestep": time, "encoder_hidden_states": text}
        return network, lambda net, x, t, e: net(x, t, encoder_hidden_states=e).sample, inputs
    if name == "DiTTransformer2DModel":
        network = kind(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
            num_embeds_ada_norm=1000,
        )  # fmt: skip
        inputs = {"sample": sample, "timestep": time, "class_labels": torch.tensor([1, 2])}
        return network, lambda net, x, t, y: net(x, timestep=t, class_labels=y).sample, inputs
    if name == "SD3Transformer2DModel":
        network = kind(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        )  # fmt: skip
        inputs = {
            "sample": sample,
            "timestep": time.float(),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
        }
        return network, lambda net, x, t, e, p: net(x, e, p, t).sample, inputs
    if name == "FluxTransformer2DModel":
        network = kind(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=64, axes_dims_rope=[4, 4, 8],
        )  # fmt: skip
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        inputs = {
            "sample": torch.randn(2, 16, 4), "timestep": torch.tensor([0.1, 0.5]), "encoder_hidden_states": text,
            "pooled_projections": pooled, "txt_ids": torch.zeros(7, 3), "img_ids": ids,
        }  # fmt: skip
        return network, lambda net, x, t, e, p, a, b: net(x, e, p, t, b, a).sample, inputs
    if name == "WanTransformer3DModel":
        network = kind(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
            ffn_dim=32, num_layers=1, rope_max_seq_len=32,
        )  # fmt: skip
        inputs = {"sample": torch.randn(2, 4, 2, 16, 16), "timestep": time, "encoder_hidden_states": text}
        return network, lambda net, x, t, e: net(x, t, e).sample, inputs
    network = kind(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    return network, lambda net, z: net.decode(z).sample, {"latent": sample}


def of_denoising_diffusion_pytorch(name: str) -> Made:
    import denoising_diffusion_pytorch
    import torch

    kind = getattr(denoising_diffusion_pytorch, name)
    inputs = {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([10, 500])}
    if name == "KarrasUnet":
        network = kind(
            image_size=32, channels=3, dim=32, dim_max=64, num_downsamples=2, attn_res=(16, 8), attn_flash=False,
            num_blocks_per_stage=1,
        )  # fmt: skip
        inputs["timestep"] = torch.tensor([0.1, 0.5])
        for key, parameter in network.named_parameters():
            if key.endswith("gain"):
                torch.nn.init.constant_(parameter, 0.5)  # zeros as it is made
    elif name == "Unet1D":
        network = kind(32, dim_mults=(1, 2, 4), channels=4)
        inputs["sample"] = torch.randn(2, 4, 64)
    else:
        network = kind(32, dim_mults=(1, 2, 4), flash_attn=False)
    return network, lambda net, x, t: net(x, t), inputs


def of_monai(name: str) -> Made:
    import torch
    from monai.networks import nets

    sizes: dict[str, dict[str, Any]] = {
        "UNETR": {
            "in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 96,
            "mlp_dim": 192, "num_heads": 4,
        },
        "SegResNet": {"spatial_dims": 2, "init_filters": 8, "in_channels": 1, "out_channels": 2},
        "DynUNet": {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
        },
        "ViT": {
            "in_channels": 1, "img_size": (64, 64), "patch_size": (8, 8), "hidden_size": 96, "mlp_dim": 192,
            "num_layers": 2, "num_heads": 4, "spatial_dims": 2, "classification": True,
        },
        "DiffusionModelUNet": {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (32, 64),
            "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 32,
        },
        "AutoencoderKL": {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (32, 64), "latent_channels": 4,
            "num_res_blocks": (1, 1), "attention_levels": (False, True),
        },
    }  # fmt: skip
    network, picture = getattr(nets, name)(**sizes[name]), torch.randn(2, 1, 64, 64)
    if name == "UNETR":
        picture = torch.randn(2, 1, 32, 32, 32)
    if name == "DiffusionModelUNet":
        torch.nn.init.normal_(network.out[-1].conv.weight, std=0.05)  # zeros as it is made
        inputs = {"sample": picture, "timestep": torch.tensor([10, 500])}
        return network, lambda net, x, t: net(x, t), inputs
    several = name in ("ViT", "AutoencoderKL")
    return network, lambda net, x: net(x)[0] if several else net(x), {"x": picture}


def rows(name: str, value: Any) -> np.ndarray:
    """Inputs for several samples like those of the export; what has no batch axis as it is."""
    import torch

    if name.endswith("_ids") and value.is_floating_point():
        return np.asarray(value.numpy())
    parts = []
    for _ in range(ROWS // len(value)):
        if name in ("timestep", "attention_mask", "class_labels"):
            parts.append(value)
        elif value.is_floating_point():
            parts.append(torch.randn(value.shape))
        else:
            parts.append(torch.randint(3, 900, value.shape))
    return np.asarray(torch.cat(parts or [value]).numpy())


def export(library: str, name: str, exporter: str, dtype: str, path: Path) -> None:
    """Write the network and inputs for it; runs in a process of its own."""
    import torch

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    network, call, inputs = globals()[f"of_{library}"](name)
    network.to(getattr(torch, dtype))

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Any) -> Any:
            return call(self.network, *values)

    called = Called().eval()
    for module in called.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.train()
    np.savez(path.with_suffix(".npz"), **{key: rows(key, value) for key, value in inputs.items()})
    floats = {key: value.to(getattr(torch, dtype)) for key, value in inputs.items() if value.is_floating_point()}
    inputs |= floats
    with torch.no_grad():
        called(*inputs.values())
    called.eval()
    options = {"external_data": False, "verbose": False} if exporter == "dynamo" else {}
    torch.onnx.export(
        called, tuple(inputs.values()), path, dynamo=exporter == "dynamo", input_names=list(inputs),
        opset_version=21 if exporter == "dynamo" else 17, **options,
    )  # fmt: skip


def run(*command: str) -> tuple[int, str]:
    """The exit code of `onnxq` and the last line of its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return 124, f"longer than {SECONDS} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode, errors[0] if errors else " ".join(done.stderr.split())[-300:]


def measure(folder: Path, library: str, name: str, exporter: str, dtype: str, sm: str | None) -> dict[str, Any]:
    """Everything about one network."""
    path = folder / f"{library}-{name}-{exporter}{'' if dtype == 'float32' else '-' + dtype}.onnx"
    if not path.is_file():
        code, error = run(__file__, "--export", library, name, exporter, dtype, "--out", str(path))
        if code or not path.is_file():
            return {"export": error or "no file"}
    found: dict[str, Any] = {}
    for target in targets.names():
        result, numbers = path.with_suffix(f".{target}.onnx"), path.with_suffix(f".{target}.json")
        code, error = run(
            "-m", "onnxq.cli", "quantize", str(path), "--data", str(path.with_suffix(".npz")), "-o", str(result),
            "--target", target, "-q", "--json", str(numbers),
        )  # fmt: skip
        if code:
            found[target] = {"error": error}
            continue
        keys = ("sqnr_db", "quantized_nodes", "weighted_nodes", "latency_ms_float", "latency_ms_quantized")
        found[target] = {key: value for key, value in json.loads(numbers.read_text()).items() if key in keys}
        if target == "tensorrt" and sm is not None:
            found[target]["engine"] = built(result, path, sm)
    return found


def built(result: Path, path: Path, sm: str) -> str:
    """How many layers lost their codes in the engine that is written beside ``path``, or the error."""
    proof = path.with_suffix(".build.json")
    code, error = run(
        "-m", "onnxq.cli", "build", str(result), "-o", str(path.with_suffix(".engine")), "--sm", sm, "-q",
        "--json", str(proof),
    )  # fmt: skip
    made = json.loads(proof.read_text()) if proof.is_file() else {}
    return error if code == 2 else f"{len(made.get('promised_but_float', []))} lost"


def quality(numbers: dict[str, Any]) -> str:
    """How many layers have codes, and what the output keeps."""
    ratio = numbers["sqnr_db"]
    kept = "lossless" if ratio in (None, "inf") else f"{ratio:.1f} dB"
    return f"{numbers['quantized_nodes']}/{numbers['weighted_nodes']} {kept}"


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    if "export" in found:
        return f"{name:52} not exported: {found['export'][:80]}"
    cells = [f"{name:52}"]
    for target in targets.names():
        cell = found[target]
        if "error" in cell:
            cells.append(f"{cell['error'][:60]:>30}")
            continue
        text = quality(cell)
        if target == "cpu" and cell.get("latency_ms_float"):
            text += f" {cell['latency_ms_quantized'] / cell['latency_ms_float']:.2f}"
        cells.append(f"{text:>24} {cell.get('engine', '')}")
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("architectures"))
    parser.add_argument("--libraries", nargs="*", default=list(NAMES))
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the export")
    parser.add_argument("--build", metavar="SM", help="compile an engine for this architecture, too")
    parser.add_argument("--export", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        export(*arguments.export, arguments.out)
        return
    arguments.out.mkdir(exist_ok=True, parents=True)
    kept = arguments.out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for library in arguments.libraries:
        for name in NAMES[library]:
            if arguments.names and name not in arguments.names:
                continue
            how = (arguments.exporter, arguments.dtype)
            key = ":".join((library, name, *how[: 1 if arguments.dtype == "float32" else 2]))
            if key not in results:
                results[key] = measure(arguments.out, library, name, *how, arguments.build)
                kept.write_text(json.dumps(results, indent=1))
            print(line(key, results[key]), flush=True)


if __name__ == "__main__":
    main()
