"""Prompts become the rows that a pipeline's denoiser reads, as diffusers' pipelines make them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights
from PIL import Image
from test_cli_errors import assert_two_lines, run
from test_readme import COMMANDS

from onnxq import model as models
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.conditions import open_conditions
from onnxq.diffusion.schedule_file import pipeline_folders
from onnxq.errors import OnnxqError

PROMPTS = ["a cat and a dog", "the moon, on a dog", "cat"]
WORDS = ["c a", "ca t</w>", "d o", "do g</w>", "a n"]
LENGTH = 77
SMALL, LARGE, T5 = 16, 32, 48  # widths
DRAWING = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)  # from latents to colours

# Inputs of each pipeline's denoiser beside sample and timestep, its encoders, and what stands in its model_index.json.
PIPELINES: dict[str, tuple[dict[str, str], list[str], dict[str, Any]]] = {
    "StableDiffusionPipeline": ({"encoder_hidden_states": f"N,S,{SMALL}"}, ["clip"], {}),
    "StableDiffusionXLPipeline": (
        {"encoder_hidden_states": f"N,{LENGTH},{SMALL + LARGE}", "text_embeds": f"N,{LARGE}", "time_ids": "N,6"},
        ["clip", "large"], {"force_zeros_for_empty_prompt": True},
    ),
    "StableDiffusionXLImg2ImgPipeline": (
        {"encoder_hidden_states": f"N,S,{LARGE}", "text_embeds": f"N,{LARGE}", "time_ids": "N,5"},
        ["", "large"], {"force_zeros_for_empty_prompt": False},
    ),
    "StableDiffusion3Pipeline": (
        {"encoder_hidden_states": f"N,S,{T5}", "pooled_projections": f"N,{SMALL + LARGE}"},
        ["small", "large", "t5"], {},
    ),
    "FluxPipeline": (
        {"encoder_hidden_states": f"N,S,{T5}", "pooled_projections": f"N,{SMALL}", "guidance": "N"}, ["clip", "t5"], {},
    ),
}  # fmt: skip


def denoiser_file(path: Path, inputs: dict[str, str]) -> Path:
    """A denoiser that leaves its conditions alone."""
    given = "".join(f", float[{shape}] {name}" for name, shape in inputs.items())
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net (float[N,4,4,4] sample, float[N] timestep{given}) => (float[N,4,4,4] eps)
    <int64[3] axes = {{1, 2, 3}}, float zero = {{0.0}}>
    {{ a = Unsqueeze (timestep, axes)  z = Mul (sample, zero)  eps = Add (z, a) }}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save(ir.from_onnx_text(text), path)
    return path


def decoder_file(path: Path, batch: str = "N", channels: int = 4) -> Path:
    """A decoder: every pixel is a sum over its latent's channels."""
    numbers = ", ".join(f"{value:.9g}" for value in np.resize(DRAWING, 3 * channels))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    decoder (float[{batch},{channels},H,W] latent_sample) => (float[{batch},3,H,W] sample)
    <float[3,{channels},1,1] weights = {{{numbers}}}>
    {{ sample = Conv (latent_sample, weights) }}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save(ir.from_onnx_text(text), path)
    return path


def clip_tokenizer(folder: Path) -> None:
    """The files of Stable Diffusion's tokenizer, with few words."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(word.replace(" ", "") for word in WORDS)]
    vocabulary = {piece: token for token, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    marks = {"bos_token": "<|startoftext|>", **dict.fromkeys(["eos_token", "unk_token", "pad_token"], "<|endoftext|>")}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *WORDS, ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **marks})
    )


def t5_tokenizer(folder: Path) -> None:
    """One of whole words, as T5 has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [(f"▁{word}", -2.0) for word in ("a", "cat", "dog", "and", "on", "the", "moon")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *((letter, -8.0) for letter in "▁abcdefgmnot,")]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LENGTH, **marks).save_pretrained(folder)


def export(net: Any, path: Path) -> None:
    """An encoder with all that it returns, its hidden states last."""
    import torch

    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        found = net(tokens, output_hidden_states=True)
    names = [name for name in found if name != "hidden_states"]

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, tokens: Any) -> Any:
            found = self.net(tokens, output_hidden_states=True)
            return (*(found[name] for name in names), *found.hidden_states)

    hidden = [f"hidden_states.{index}" for index in range(len(found.hidden_states))]
    path.parent.mkdir(parents=True)
    torch.onnx.export(
        Flat().eval(), (tokens,), path, input_names=["input_ids"], output_names=[*names, *hidden], opset_version=17,
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}}, dynamo=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The encoders in torch, and a folder that holds each as ONNX with its tokenizer beside it."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("encoders")
    clip_tokenizer(folder / "tokenizer")
    tokens = len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    torch.manual_seed(0)

    def clip(width: int, kind: str) -> Any:
        config = transformers.CLIPTextConfig(
            vocab_size=tokens, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=width, bos_token_id=tokens - 2, eos_token_id=tokens - 1, max_position_embeddings=LENGTH,
        )  # fmt: skip
        return getattr(transformers, kind)(config).eval()

    config = transformers.T5Config(vocab_size=64, d_model=T5, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    nets = {
        "clip": clip(SMALL, "CLIPTextModel"),
        "small": clip(SMALL, "CLIPTextModelWithProjection"),
        "large": clip(LARGE, "CLIPTextModelWithProjection"),
        "t5": transformers.T5EncoderModel(config).eval(),
    }
    for name, net in nets.items():
        export(net, folder / name / "model.onnx")
        if name == "t5":
            t5_tokenizer(folder / name / "tokenizer")
        else:
            shutil.copytree(folder / "tokenizer", folder / name / "tokenizer")
    return folder, nets


def lay_down(folder: Path, encoders: Path, kind: str) -> Path:
    """A pipeline as exporters write it, and the file of its denoiser."""
    inputs, names, entries = PIPELINES[kind]
    for suffix, name in zip(("", "_2", "_3"), names, strict=False):
        if name:
            shutil.copytree(encoders / name / "tokenizer", folder / f"tokenizer{suffix}")
            (folder / f"text_encoder{suffix}").mkdir()
            shutil.copy(encoders / name / "model.onnx", folder / f"text_encoder{suffix}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **entries}))
    return denoiser_file(folder / "unet" / "model.onnx", inputs)


def of_diffusers(kind: str, folder: Path, nets: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the pipeline of diffusers gives its denoiser."""
    import diffusers
    import torch
    from transformers import AutoTokenizer

    inputs, names, entries = PIPELINES[kind]
    parts: dict[str, Any] = {}
    for suffix, name in zip(("", "_2", "_3"), names, strict=False):
        parts[f"text_encoder{suffix}"] = nets.get(name)
        parts[f"tokenizer{suffix}"] = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}") if name else None
    network = "unet" if "text_embeds" in inputs or kind == "StableDiffusionPipeline" else "transformer"
    parts |= {"vae": None, network: None, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    if kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any = getattr(diffusers, kind)(**parts, **entries)
    pooled = next((name for name in inputs if len(inputs[name].split(",")) == 2 and name != "time_ids"), None)
    with torch.no_grad():
        if kind == "StableDiffusionPipeline":
            states, none = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
            found = {"": (states, none)}
        elif kind == "FluxPipeline":
            states, whole, _ = pipeline.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=LENGTH)
            found = {"": (states, None), "pooled": (whole, None)}
        else:
            more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": LENGTH} if "3" in kind else {}
            states, none, whole, without = pipeline.encode_prompt(PROMPTS, device="cpu", **more)
            found = {"": (states, none), "pooled": (whole, without)}
    rows = {}
    for part, (given, without) in found.items():
        name = pooled if part else "encoder_hidden_states"
        rows[str(name)] = given.numpy()
        if without is not None:
            rows[f"{name}.unconditional"] = without[:1].numpy()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIPELINES)
def test_rows_are_those_of_diffusers(kind: str, encoders: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path = lay_down(tmp_path, encoders[0], kind)
    prompts = tmp_path / "prompts.npz"
    np.savez(prompts, prompts=np.asarray(PROMPTS), guidance=np.ones(1, np.float32))
    found = open_conditions(prompts, denoisers.find(models.load(path)), pipeline_folders(None, path))
    wanted = of_diffusers(kind, tmp_path, encoders[1])
    assert wanted.keys() >= {name for name in PIPELINES[kind][0] if name not in ("time_ids", "guidance")}
    for name, rows in wanted.items():
        np.testing.assert_allclose(found[name], rows, atol=1e-4, err_msg=name)
        assert name.endswith(".unconditional") or np.abs(rows[0] - rows[1]).max() > 0.1
    if "time_ids" in PIPELINES[kind][0]:  # the picture has eight pixels for each latent
        beauty = kind.endswith("Img2ImgPipeline")
        last = ([6.0], [2.5]) if beauty else ([32.0, 32.0], [32.0, 32.0])
        np.testing.assert_array_equal(found["time_ids"], [[32, 32, 0, 0, *last[0]]] * len(PROMPTS))
        np.testing.assert_array_equal(found["time_ids.unconditional"], [[32, 32, 0, 0, *last[1]]])


def test_prompts_on_the_command_line(
    encoders: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text file with a prompt a line, and all that can be wrong about it."""
    path, prompts = lay_down(tmp_path / "pipeline", encoders[0], "StableDiffusionPipeline"), tmp_path / "prompts.txt"

    def record(*more: object, model: Path = path) -> tuple[int, str]:
        out = ("-o", tmp_path / "out.npz", "--steps", 2, "-n", 4, "-q")
        return run(capsys, "trajectories", model, "--conditions", prompts, *out, *more)

    assert_two_lines(*record(), "UTF-8 text", "nothing")
    prompts.write_text("\n")
    assert_two_lines(*record(), "a prompt a line")
    prompts.write_text("\n".join(PROMPTS))
    assert record("--guidance", 3)[0] == 0
    with np.load(tmp_path / "out.npz") as recorded:
        assert recorded["encoder_hidden_states"].shape[1:] == (LENGTH, SMALL)
    prompts.write_text("\n".join(f"{prompt} {number}" for prompt in PROMPTS for number in range(4)))
    assert record()[0] == 0
    with np.load(tmp_path / "out.npz") as recorded:  # of twelve, every third
        wanted = open_conditions(prompts, denoisers.find(models.load(path)), pipeline_folders(None, path))
        seen = {row.tobytes() for row in recorded["encoder_hidden_states"]}
        assert seen == {row.tobytes() for row in wanted["encoder_hidden_states"][::3]} and len(seen) == 4
    prompts.write_text("\n".join(PROMPTS))
    alone = denoiser_file(tmp_path / "elsewhere" / "denoiser.onnx", PIPELINES["StableDiffusionPipeline"][0])
    assert_two_lines(*record(model=alone), "text_encoder/model.onnx", "--scheduler")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    config = {"_class_name": "DDIMScheduler"}
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert record("--scheduler", tmp_path / "pipeline", model=alone)[0] == 0
    moved = denoiser_file(tmp_path / "pipeline" / "other" / "model.onnx", {"text": f"N,S,{SMALL}", "motion": "N"})
    assert_two_lines(*record(model=moved), "'motion'", "'prompts'")
    pictured = {"text": f"N,S,{SMALL}", "image_embeds": f"N,S,{SMALL}"}
    adapted = denoiser_file(tmp_path / "pipeline" / "adapted" / "model.onnx", pictured)
    assert_two_lines(*record(model=adapted), "'image_embeds'", "'prompts'")
    wide = denoiser_file(tmp_path / "pipeline" / "wide" / "model.onnx", {"text": f"N,S,{SMALL + 1}"})
    assert_two_lines(*record(model=wide), f"[any, any, {SMALL + 1}]", f"[any, {LENGTH}, {SMALL}]")
    (tmp_path / "pipeline" / "tokenizer" / "vocab.json").write_text("{")
    assert_two_lines(*record(), "a tokenizer in")
    shutil.rmtree(tmp_path / "pipeline" / "tokenizer")
    assert_two_lines(*record(), "a tokenizer in", "nothing")
    (tmp_path / "pipeline" / "text_encoder" / "model.onnx").unlink()
    assert_two_lines(*record(), "a text encoder at", "nothing")


@pytest.mark.parametrize("command", ["trajectories", "quantize"])
def test_encoding_says_how_long_it_took(
    command: str, encoders: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large encoder takes minutes on a CPU; nobody should wonder what is going on."""
    path, prompts = lay_down(tmp_path, encoders[0], "StableDiffusionPipeline"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ("--conditions", prompts, "-o", tmp_path / f"out.{'npz' if command == 'trajectories' else 'onnx'}")
    _, stderr = run(capsys, command, path, *options, "--steps", 2, "-n", len(PROMPTS), "--verbose")
    assert re.search(rf"Encoding prompts \(text_encoder\): [\d.]+ s for {len(PROMPTS) + 1} texts", stderr)


# Two convolutions between which the text has its say, and the timestep.
READER = """<ir_version: 10, opset_import: ["" : 21]>
reader (float[N,4,H,W] sample, int64 timestep, float[N,S,16] encoder_hidden_states) => (float[N,4,H,W] out_sample)
<int64[1] tokens = {1}, int64[2] axes = {2, 3}>
{
    [narrow] h = Conv <pads = [1, 1, 1, 1]> (sample, w1)
    text = ReduceMean <keepdims = 0> (encoder_hidden_states, tokens)
    [project] p = MatMul (text, w2)
    time = Cast <to = 1> (timestep)
    wave = Sin (time)
    shifted = Add (p, wave)
    wide = Unsqueeze (shifted, axes)
    sum = Add (h, wide)
    r = Relu (sum)
    [last] out_sample = Conv <pads = [1, 1, 1, 1]> (r, w3)
}"""


def test_commands_of_the_readme_on_a_pipeline_run(
    encoders: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """As they stand, on a small pipeline with the names and the free sizes that exporters give it."""
    pipeline = tmp_path / "sd15"
    denoiser = lay_down(pipeline, encoders[0], "StableDiffusionPipeline")
    ir.save(add_weights(READER, {"w1": [32, 4, 3, 3], "w2": [SMALL, 32], "w3": [4, 32, 3, 3]}), denoiser)
    denoiser.with_name("config.json").write_text('{"sample_size": 8}')
    decoder_file(pipeline / "vae_decoder" / "model.onnx")
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler"}')
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    lines = [line for line in COMMANDS if "sd15/" in line]
    assert [line.split()[1] for line in lines] == ["quantize", "sample"]
    for line in lines:
        code, stderr = run(capsys, *shlex.split(line)[1:])
        assert code == 0, f"{line}\n{stderr}"
    with Image.open("grid.png") as grid:
        assert grid.size[0] >= 2 * 8 * 8


def test_without_the_package_that_reads_tokenizers(
    encoders: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts = lay_down(tmp_path, encoders[0], "StableDiffusionPipeline"), tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OnnxqError, match="package transformers") as error:
        open_conditions(prompts, denoisers.find(models.load(path)), pipeline_folders(None, path))
    assert "onnxq[prompts]" in (error.value.hint or "")
