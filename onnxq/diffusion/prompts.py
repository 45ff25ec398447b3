"""Prompts as conditions of a denoiser: what the tokenizers and text encoders of its pipeline make of them.

Exporters write a pipeline as a folder: the denoiser's own folder, and beside it ``tokenizer`` and
``text_encoder/model.onnx``, of which larger pipelines have two or three (``tokenizer_2``, ``text_encoder_2``, …). Which
outputs of the encoders a denoiser reads follows from its inputs: states of tokens [batch, tokens, width], what an
encoder says of the whole text [batch, width], masks, and the sizes of the picture in the family of SDXL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq import model as models
from onnxq.calibration.data import Array, InputSpec, fixed_batch, input_specs
from onnxq.calibration.text import MASKS, check_roles, fixed_length, text_feed
from onnxq.calibration.tokenizers import read_folder
from onnxq.diffusion.denoiser import UNCONDITIONAL, Denoiser, batch_rows, shown
from onnxq.diffusion.exported_config import read_config
from onnxq.diffusion.packing import OF_TEXT
from onnxq.errors import OnnxqError
from onnxq.progress import Progress
from onnxq.runtime import Session

BATCH = 8  # prompts that are encoded at once
LONGEST_TEXT = 512  # tokens, where neither denoiser nor encoder nor tokenizer says less
ENCODER, TOKENIZER, GRAPH = "text_encoder", "tokenizer", "model.onnx"
SIZES = "time_ids"
NOT_OF_TEXT = ("image", "img", OF_TEXT)  # in the names of embeddings that may have a text's width, and of positions
PIXELS_PER_LATENT = 8
AESTHETIC_SCORE, WITHOUT_PROMPT = 6.0, 2.5  # what SDXL's refiner is told of a picture's beauty
INSTEAD = "give --conditions an .npz of rows keyed by input name"


@dataclass(frozen=True)
class Encoded:
    """What one encoder makes of all texts.

    Attributes:
        states: Of the last layer, [texts, tokens, width].
        mask: 1 where there is text, [texts, tokens].
        early_states: Of the layer before, where the export returns it.
        pooled: Of a text as a whole, [texts, width], where there is such an output.
    """

    states: Array
    mask: Array
    early_states: Array | None = None
    pooled: Array | None = None


def is_of_text(spec: InputSpec) -> bool:
    """Whether prompts may give an input's rows: states, a whole text's vector, a mask or sizes."""
    return not spec.is_whole and len(spec.shape) in (2, 3) and not any(word in spec.name for word in NOT_OF_TEXT)


def encode_prompts(
    prompts: Sequence[str],
    specs: Sequence[InputSpec],
    denoiser: Denoiser,
    pipelines: Sequence[Path],
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Array]:
    """A row for each prompt under the names of a denoiser's inputs, and that of the empty prompt for guidance.

    All rows are in memory: 0.2 MB for a prompt of Stable Diffusion, 0.6 MB of SDXL.

    Args:
        prompts: The prompts.
        specs: The inputs that :func:`is_of_text`.
        denoiser: The denoiser.
        pipelines: Folders that may be that of its pipeline; the first that holds a text encoder is.
        device: Where the encoders run.
        progress: Where to say how far they are; a large one takes minutes on a CPU.

    Returns:
        ``[prompts, …]`` by name, and ``[1, …]`` under ``NAME.unconditional``.

    Raises:
        OnnxqError: there is no text encoder in ONNX, or the inputs are nothing that the encoders make.
    """
    around = {folder: _suffixes(folder) for folder in pipelines}
    folder = next((folder for folder, suffixes in around.items() if suffixes), None)
    if folder is None:
        raise OnnxqError(
            f"expected a pipeline's folder with {ENCODER}/{GRAPH}, which makes rows of prompts, found none around the "
            "model",
            hint=f"give the pipeline's folder with --scheduler, or {INSTEAD}",
        )
    lengths = [size for spec in specs if len(spec.shape) == 3 and (size := spec.shape[1]) is not None]
    length = min(lengths, default=LONGEST_TEXT)
    all_of_them, progress = [*prompts, ""], progress or Progress()
    texts = [_encode(all_of_them, folder, suffix, length, device, progress) for suffix in around[folder]]
    zero = read_config(folder / "model_index.json").get("force_zeros_for_empty_prompt") is True  # as SDXL's has it
    found = {}
    for spec in specs:
        rows = _sizes(spec, denoiser, len(prompts) + 1) if SIZES in spec.name else _rows(spec, specs, texts, folder)
        is_zero = zero and SIZES not in spec.name and not spec.name.endswith(MASKS)
        found[spec.name] = rows[:-1]
        found[spec.name + UNCONDITIONAL] = np.zeros_like(rows[-1:]) if is_zero else rows[-1:]
    return found


def _suffixes(folder: Path) -> list[str]:
    """Behind the names of a pipeline's encoders and tokenizers; SDXL's refiner has the second pair alone."""
    return [suffix for suffix in ("", "_2", "_3") if (folder / f"{ENCODER}{suffix}").is_dir()]


def _rows(spec: InputSpec, specs: Sequence[InputSpec], texts: Sequence[Encoded], folder: Path) -> Array:
    """The rows of one input, from those outputs of the encoders that have its rank and width."""
    width = spec.shape[-1]
    if spec.name.endswith(MASKS):
        return texts[-1].mask
    if len(spec.shape) == 2:
        made = [text.pooled for text in texts if text.pooled is not None]
    elif any(SIZES in other.name for other in specs):  # SDXL
        made = [text.early_states for text in texts if text.early_states is not None]
    elif len(texts) == 3:  # Stable Diffusion 3: both CLIP side by side, then T5, along the tokens
        clip = _beside([text.early_states for text in texts[:2] if text.early_states is not None])
        missing = texts[2].states.shape[-1] - (clip[0].shape[-1] if clip else 0)
        padded = [np.pad(states, ((0, 0), (0, 0), (0, missing))) for states in clip if missing >= 0]
        made = [np.concatenate([*padded, texts[2].states], 1)] if padded else []
    else:
        made = [text.states for text in texts]
    for rows in [*_beside(made), *reversed(made)]:
        if rows.shape[-1] == (width or rows.shape[-1]):
            return rows
    names = ", ".join(shown([None, *rows.shape[1:]]) for rows in made) or "nothing of this rank"
    raise OnnxqError(
        f"expected text encoders in {folder} that make {spec.name!r} {shown(spec.shape)}, found {names}",
        hint=f"export them with their hidden states, or {INSTEAD}",
    )


def _beside(parts: Sequence[Array]) -> list[Array]:
    """Several arrays side by side along their last axis, where the others agree."""
    fits = len(parts) > 1 and len({part.shape[:-1] for part in parts}) == 1
    return [np.concatenate(parts, -1)] if fits else []


def _sizes(spec: InputSpec, denoiser: Denoiser, count: int) -> Array:
    """What SDXL is told of the picture: its own size, where it was cut, and the size or beauty that is wanted."""
    height, width = (float(PIXELS_PER_LATENT * size) for size in denoiser.noise_shape[-2:])
    row = [height, width, 0.0, 0.0, *([AESTHETIC_SCORE] if spec.shape[-1] == 5 else [height, width])]
    rows = np.tile(np.asarray(row, np.float32), (count, 1))
    if spec.shape[-1] == 5:
        rows[-1, -1] = WITHOUT_PROMPT
    return rows


def _encode(texts: Sequence[str], folder: Path, suffix: str, length: int, device: str, progress: Progress) -> Encoded:
    """Run one encoder over texts."""
    path = folder / f"{ENCODER}{suffix}" / GRAPH
    if not path.is_file():
        raise OnnxqError(f"expected a text encoder at {path}, found nothing", hint=f"export it there, or {INSTEAD}")
    specs = input_specs(models.read(path))
    check_roles(specs, hint=INSTEAD)
    tokens, mask = _tokens(texts, folder / f"{TOKENIZER}{suffix}", fixed_length(specs), length)
    roles: dict[str, str] = {}
    parts: dict[str, list[Array]] = {}
    with progress.stage("prompts", f"Encoding prompts ({path.parent.name})", len(texts), "texts") as advance:
        session, batch = Session(path, device=device), fixed_batch(specs) or BATCH
        for start in range(0, len(texts), batch):
            feed = text_feed(specs, batch_rows(tokens, start, batch), batch_rows(mask, start, batch))
            names = list(roles.values()) or session.output_names
            made = dict(zip(names, session.run(feed, names), strict=True))
            roles = roles or _roles(made, path)
            for role, name in roles.items():
                parts.setdefault(role, []).append(made[name].astype(np.float32, copy=False))
            advance(min(start + batch, len(texts)))
    return Encoded(mask=mask, **{role: np.concatenate(part)[: len(texts)] for role, part in parts.items()})


def _roles(made: Mapping[str, Array], path: Path) -> dict[str, str]:
    """Which output of an encoder is what :class:`Encoded` holds; hidden states go from the embedding to the end."""
    states = [name for name, value in made.items() if value.ndim == 3]
    hidden = [name for name in states if name.startswith("hidden_states")]
    last = [name for name in states if name not in hidden] or hidden[-1:]
    if not last:
        raise OnnxqError(
            f"expected states [batch, tokens, width] from {path}, found outputs {', '.join(made)}",
            hint=f"export the text encoder itself, or {INSTEAD}",
        )
    pooled = [name for name in ("text_embeds", "pooler_output", *made) if name in made and made[name].ndim == 2]
    found = {"states": last[:1], "early_states": hidden[-2:-1], "pooled": pooled[:1]}
    return {role: names[0] for role, names in found.items() if names}


def _tokens(texts: Sequence[str], folder: Path, fixed: int | None, length: int) -> tuple[Array, Array]:
    """Tokens and mask [texts, tokens], all filled up to one length as pipelines do it."""
    tokenizer = read_folder(folder)
    length = fixed or min(length, tokenizer.model_max_length)
    try:
        found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    except ValueError as error:
        raise OnnxqError(
            f"expected a tokenizer that fills texts up to one length in {folder}, found: {error}", hint=INSTEAD
        ) from error
    return np.asarray(found["input_ids"], np.int64), np.asarray(found["attention_mask"], np.int64)
