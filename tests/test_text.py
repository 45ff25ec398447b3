"""Text files as calibration data: tokenizers, sequences, perplexity, and what is said when something is missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DATA, add_weights
from test_prompts import clip_tokenizer
from typer.testing import CliRunner

import onnxq
from onnxq import model as models
from onnxq.calibration.data import InputSpec, Preprocessing, open_source
from onnxq.calibration.text import roles_of
from onnxq.calibration.tokenizers import open_tokenizer, read_llama2c
from onnxq.cli import app
from onnxq.errors import OnnxqError

INT64 = np.dtype(np.int64)
DECODER = [
    InputSpec("input_ids", INT64, (None, None)),
    InputSpec("attention_mask", INT64, (None, None)),
    InputSpec("position_ids", INT64, (None, None)),
]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A vocabulary of llama2.c: specials, all bytes, then a few letters and merges."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    merges = [b" ", b"a", b"b", b"c", b"ab", b"bc", b" a"]
    scores = [0.0] * len(pieces) + [-9, -9, -9, -9, -1, -2, -3]
    data = struct.pack("<i", 8) + b"".join(
        struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(pieces + merges, scores, strict=True)
    )
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    return path


def test_pairs_merge_best_score_first_and_unknown_characters_become_bytes(vocabulary: Path) -> None:
    tokenizer = read_llama2c(vocabulary)
    names = [tokenizer.pieces[token] for token in tokenizer.encode("abc")]
    assert names == [b"\n<s>\n", b" ", b"ab", b"c"]  # ab before bc and before ' a'
    assert tokenizer.encode("é")[2:] == [3 + byte for byte in "é".encode()]


def test_text_becomes_sequences_with_masks_and_positions(vocabulary: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("cccc cccc cc")
    source = open_source(text, DECODER, Preprocessing(tokenizer=str(vocabulary), sequence_length=5))
    rows = list(source)
    assert len(rows) == len(source) == 2  # 14 tokens: two sequences, the rest is dropped
    np.testing.assert_array_equal(rows[1]["position_ids"], np.arange(5))
    np.testing.assert_array_equal(rows[1]["attention_mask"], np.ones(5))
    assert rows[0]["input_ids"][0] == 1 and rows[0]["input_ids"].dtype == INT64


def test_a_tokenizer_json_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "once": 1, "upon": 2}, "unk_token": "[UNK]"}
    path.write_text(
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []})
    )
    assert open_tokenizer(path).encode("once upon once never") == [1, 2, 1, 0]
    del model["vocab"]["[UNK]"]
    path.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    with pytest.raises(OnnxqError, match=r"takes any text in .*UNK"):
        open_tokenizer(path).encode("never")
    path.write_text("{}")
    with pytest.raises(OnnxqError, match=r"tokenizer\.json"):
        open_tokenizer(path)


def test_a_tokenizer_of_a_folder_is_read(tmp_path: Path) -> None:
    """As Stable Diffusion has it: no tokenizer.json, 77 tokens at most."""
    pytest.importorskip("transformers")
    folder, text = tmp_path / "tokenizer", tmp_path / "prompts.txt"
    clip_tokenizer(folder)
    tokenizer = open_tokenizer(folder)
    text.write_text("a cat\n" + "a dog " * 80)
    rows = list(open_source(text, ENCODER, Preprocessing(tokenizer=str(folder), sequence_length=256)))
    begin, *words, end = tokenizer.encode("a cat")
    assert len(words) == 2 and end == begin + 1 == tokenizer.padding
    np.testing.assert_array_equal(rows[0]["input_ids"], [begin, *words, *[end] * 74])
    np.testing.assert_array_equal(rows[0]["attention_mask"], [1] * 4 + [0] * 73)
    assert rows[1]["attention_mask"].all() and rows[1]["input_ids"][-1] == end
    (folder / "vocab.json").unlink()
    with pytest.raises(OnnxqError, match="expected a tokenizer in"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "tokenizer", "specs", "message"),
    [
        ("abc", None, DECODER, "expected a tokenizer"),
        ("abc", "missing.json", DECODER, "found nothing"),
        ("abc", "tokenizer.bin", DECODER, "at least 256 tokens"),
        ("abc", "broken.bin", DECODER, "vocabulary of llama2.c"),
        ("é", "few.bin", DECODER, "vocabulary of llama2.c"),
        ("abc", "text.txt", DECODER, r"\.bin of llama2\.c"),
        ("abc", "tokenizer.bin", [InputSpec("cache", INT64, (None, 2, 3))], "found input 'cache'"),
    ],
)
def test_what_is_wrong_is_said(
    vocabulary: Path, tmp_path: Path, content: str, tokenizer: str | None, specs: list[InputSpec], message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content)
    (tmp_path / "broken.bin").write_bytes(vocabulary.read_bytes()[:-3])
    (tmp_path / "few.bin").write_bytes(
        struct.pack("<i", 8) + b"".join(struct.pack("<fi", 0, 1) + b"a" for _ in range(40))
    )
    named = None if tokenizer is None else str(tmp_path / tokenizer)
    with pytest.raises(OnnxqError, match=message):
        open_source(text, specs, Preprocessing(tokenizer=named))


def test_a_decoder_from_text_to_perplexity(shared_data: Path, tmp_path: Path) -> None:
    """GPTQ on int4 blocks stays closer to float's perplexity than the nearest rounding, and the table survives."""
    language = DATA / "language"
    text = tmp_path / "text.txt"
    text.write_text((language / "tinystories_train_head.txt").read_text()[:12000])
    options = ["--tokenizer", str(language / "tok512.bin"), "--sequence-length", "64", "-q"]
    perplexity = {}
    for recipe in ("int4-weights", "gptq"):
        output, numbers = tmp_path / f"{recipe}.onnx", tmp_path / "numbers.json"
        arguments = [str(language / "stories260k.onnx"), "--data", str(text), "--recipe", recipe, *options]
        done = CliRunner().invoke(app, ["quantize", *arguments, "--weights", "int4:32", "-n", "12", "-o", str(output)])
        assert done.exit_code == 0, done.output
        unseen = ["--data", str(language / "tinystories_sample.txt"), *options, "--no-latency", "--no-layers"]
        models = [str(language / "stories260k.onnx"), str(output)]
        done = CliRunner().invoke(app, ["compare", *models, *unseen, "--json", str(numbers)])
        assert done.exit_code == 0, done.output
        found = json.loads(numbers.read_text())
        perplexity["float"], perplexity[recipe] = found["perplexity_float"], found["perplexity_quantized"]
        quantized = onnxq.load(output).graph.initializers.values()
        assert any(value.dtype == ir.DataType.INT4 for value in quantized)
    assert perplexity["float"] < perplexity["gptq"] < perplexity["int4-weights"] < 1.3 * perplexity["float"]


ENCODER = [
    InputSpec("input_ids", INT64, (None, None)),
    InputSpec("attention_mask", INT64, (None, None)),
    InputSpec("token_type_ids", INT64, (None, None)),
]

SENTENCES = """<ir_version: 10, opset_import: ["" : 20]>
sentences (int64[N,S] input_ids, int64[N,S] attention_mask, int64[N,S] token_type_ids) => (float[N,S,24] hidden)
{
    words = Gather <axis=0> (vocabulary, input_ids)
    segments = Gather <axis=0> (kinds, token_type_ids)
    sum = Add (words, segments)
    kept = Cast <to=1> (attention_mask)
    last = Unsqueeze (kept, minus_one)
    masked = Mul (sum, last)
    [fc] hidden = MatMul (masked, w)
}
"""


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json as sentence encoders ship it: marks at both ends, cut and filled up to 6 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "once", "upon", "a", "time"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(6)
    made.enable_padding(length=6)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """Words and segments looked up, masked and projected: what reads text and writes none."""
    model = ir.from_onnx_text(SENTENCES)
    rng = np.random.default_rng(0)
    arrays = {"vocabulary": rng.normal(size=(8, 16)), "kinds": rng.normal(size=(2, 16)), "w": rng.normal(size=(16, 24))}
    for name, array in {**arrays, "minus_one": np.array([-1])}.items():
        dtype = np.int64 if name == "minus_one" else np.float32
        free = next(value for node in model.graph for value in node.inputs if value is not None and value.name == name)
        free.const_value = ir.Tensor(array.astype(dtype), name=name)
        free.type, free.shape = ir.TensorType(free.const_value.dtype), free.const_value.shape
        model.graph.register_initializer(free)
    path = tmp_path / "encoder.onnx"
    ir.save(model, path)
    return path


def test_an_encoder_reads_a_line_at_a_time_filled_up_on_the_right(word_tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time\n\na time\n" + "upon " * 9 + "\n")
    source = open_source(text, ENCODER, Preprocessing(tokenizer=str(word_tokenizer), sequence_length=7))
    rows = list(source)
    assert len(rows) == len(source) == 3  # the empty line is none
    np.testing.assert_array_equal(rows[1]["input_ids"], [2, 6, 7, 3, 0, 0, 0])
    np.testing.assert_array_equal(rows[1]["attention_mask"], [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(rows[2]["input_ids"], [2, 5, 5, 5, 5, 5, 3])  # cut, but for its marks
    assert not rows[0]["token_type_ids"].any()
    short = open_source(text, ENCODER, Preprocessing(tokenizer=str(word_tokenizer), sequence_length=256))
    assert next(iter(short))["input_ids"].shape == (11,)  # the longest line, not 256 tokens of filling


def test_a_decoder_gets_the_whole_file_whatever_its_tokenizer_cuts(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "once": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(8)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    assert len(open_tokenizer(path).encode("once " * 40)) == 40


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_an_encoder_is_calibrated_on_text_or_on_random_tokens(
    encoder: Path, word_tokenizer: Path, tmp_path: Path, target: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time\na time\n")
    options = {"target": target, "preprocess": {"tokenizer": str(word_tokenizer)}}
    read = onnxq.quantize(encoder, text, **options)
    assert read.numbers["samples"] == 2 and read.numbers["quantized_nodes"] == 1
    guessed = onnxq.quantize(encoder, target=target)
    assert guessed.numbers["sqnr_db"] > 25  # words of the vocabulary, not tokens that are out of bounds
    assert "random tokens" in guessed.numbers["warnings"][0]


KERAS = (
    '<ir_version: 10, opset_import: ["" : 21]> g (int32[B,16] keras_tensor) => (float[B,16,64] y) '
    "<int32 zero = {0}, int32 size = {40}> {"
    " negative = Less (keras_tensor, zero)"
    " from_the_end = Add (keras_tensor, size)"
    " index = Where (negative, from_the_end, keras_tensor)"
    " e = Gather (w0, index)"
    " [first] a = MatMul (e, w1)"
    " b = Relu (a)"
    " [second] y = MatMul (b, w2) }"
)


def test_tokens_of_another_name_that_are_counted_from_the_end(tmp_path: Path) -> None:
    """Keras names no input, and numpy's negative indices stand between it and the table."""
    shapes = {"w0": (40, 64), "w1": (64, 64), "w2": (64, 64)}
    path = models.save(add_weights(KERAS, shapes), tmp_path / "m.onnx")
    result = onnxq.quantize(path, target="tensorrt")
    assert result.numbers["quantized_nodes"] == 2
    assert "random tokens" in result.numbers["warnings"][0]


def test_tokens_are_told_by_name_first() -> None:
    rows = [InputSpec(name, np.dtype(np.int64), (None, 16)) for name in ("input_ids", "other", "third")]
    assert roles_of(rows) == {"input_ids": "tokens", "other": None, "third": None}
    assert roles_of(rows[1:2]) == {"other": "tokens"}
    assert roles_of(rows[1:]) == {"other": None, "third": None}  # which of the two cannot be told
    whole = [InputSpec("picture", np.dtype(np.uint8), (1, 3, 8, 8)), rows[1]]
    assert roles_of(whole) == {"picture": None, "other": "tokens"}


TRANSLATOR = (
    '<ir_version: 10, opset_import: ["" : 21]> g (int64[B,S] input_ids, float[B,E,32] encoder_hidden_states,'
    " int64[B,E] encoder_attention_mask) => (float[B,S,40] logits) {"
    " e = Gather (w0, input_ids) q = MatMul (e, w1) k = MatMul (encoder_hidden_states, w2)"
    " mask = Cast <to = 1> (encoder_attention_mask) weight = Unsqueeze (mask, last) seen = Mul (k, weight)"
    " kt = Transpose <perm = [0,2,1]> (seen) p = MatMul (q, kt) a = Softmax (p) m = MatMul (a, seen)"
    " s = Add (m, q) logits = MatMul (s, w3) }"
)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_a_decoder_behind_an_encoder_without_data(target: str, tmp_path: Path) -> None:
    """As optimum exports translators: its own tokens, and states that only the encoder could make."""
    text = TRANSLATOR.replace(") => (float[B,S,40] logits)", ") => (float[B,S,40] logits) <int64[1] last = {-1}>")
    shapes = {"w0": (40, 64), "w1": (64, 64), "w2": (32, 64), "w3": (64, 40)}
    path = models.save(add_weights(text, shapes), tmp_path / "m.onnx")
    result = onnxq.quantize(path, target=target)
    assert result.numbers["quantized_nodes"] >= 3
    assert "random tokens and random numbers (encoder_hidden_states)" in result.numbers["warnings"][0]
    assert "--data FILE.npz" in result.numbers["warnings"][0]


def test_pictures_beside_text_are_drawn_too(tmp_path: Path) -> None:
    """As CLIP in one graph."""
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (int64[B,8] input_ids, float[B,3,8,8] pixel_values)'
        " => (float[B,B] similarity) <int64[1] axis = {1}> {"
        " e = Gather (w0, input_ids) m = ReduceMean <keepdims = 0> (e, axis) [text] t = MatMul (m, w1)"
        " flat = Flatten (pixel_values) [picture] p = MatMul (flat, w2)"
        " pt = Transpose (p) similarity = MatMul (t, pt) }"
    )
    shapes = {"w0": (40, 64), "w1": (64, 32), "w2": (192, 32)}
    path = models.save(add_weights(text, shapes), tmp_path / "m.onnx")
    result = onnxq.quantize(path, target="cpu")
    assert result.numbers["quantized_nodes"] >= 2
    assert "random numbers (pixel_values)" in result.numbers["warnings"][0]
