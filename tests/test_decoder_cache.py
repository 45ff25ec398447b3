"""Decoders that read and return their cache of keys and values: calibration, perplexity, text of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

import onnxq
from onnxq.calibration.data import InputSpec, Preprocessing, open_source
from onnxq.calibration.generated_text import GeneratedText
from onnxq.calibration.text import roles_of, text_feed
from onnxq.comparison import compare
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

torch = pytest.importorskip("torch", reason="the export needs torch: pip install 'onnxq[learn]'")
FLOAT = np.dtype(np.float32)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """An export of a decoder with random weights."""
    from cached_decoder import CachedDecoder, export

    torch.manual_seed(0)
    return export(CachedDecoder(), tmp_path / "decoder.onnx")


def token_by_token(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] of a run that feeds the model its own cache, one token at a time."""
    session = Session(path)
    feed = text_feed(specs_of(path), tokens[:, :1])
    logits = []
    for position in range(tokens.shape[1]):
        feed["input_ids"] = tokens[:, position : position + 1]
        feed["position_ids"] = np.full_like(feed["input_ids"], position)
        feed["attention_mask"] = np.ones((len(tokens), position + 1), np.int64)
        found = dict(zip(session.output_names, session.run(feed), strict=True))
        logits.append(found["logits"])
        for name in feed:
            if name.startswith("past"):
                feed[name] = found[name.replace("past_key_values", "present")]
    return np.concatenate(logits, axis=1)


def specs_of(path: Path) -> list[InputSpec]:
    from onnxq.calibration.data import input_specs

    return input_specs(onnxq.load(path))


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_quantized_decoder_decodes_from_its_cache_what_it_reads_at_once(
    decoder: Path, tmp_path: Path, target: str
) -> None:
    """No data: it writes its own text. Every position through the cache is what one run over the sequence gives."""
    output = tmp_path / f"{target}.onnx"
    result = onnxq.quantize(decoder, output=output, target=target, samples=8)
    assert result.numbers["kind"] == "language" and result.numbers["sqnr_db"] > 20
    assert "wrote itself" in " ".join(result.numbers["warnings"])
    tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
    session = Session(output, optimize=False)
    at_once = session.run(text_feed(specs_of(decoder), tokens), ["logits"])[0]
    in_steps = token_by_token(output, tokens)
    # Float sums in another order may move a value over a rounding boundary, so that a few differ by a step.
    assert np.mean(np.abs(in_steps - at_once) > 1e-3 * np.abs(at_once).max()) < 0.15
    noise = np.sum((in_steps - at_once) ** 2)
    float_logits = Session(decoder).run(text_feed(specs_of(decoder), tokens), ["logits"])[0]
    assert noise < 0.1 * np.sum((float_logits - at_once) ** 2)  # far below the error of quantizing


def test_inputs_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    tokens = InputSpec("input_ids", np.dtype(np.int64), (None, None))
    cache = InputSpec("past_key_values.0.key", FLOAT, (None, 4, None, 8))
    assert roles_of([cache]) == {cache.name: "cache"}
    text, vocabulary = tmp_path / "text.txt", tmp_path / "tokenizer.bin"
    text.write_text("some text")
    vocabulary.write_bytes(b"")
    for name, shape in (
        ("past_key_values.0.key", (None, 4, 128, 8)),  # a buffer of fixed length
        ("past_key_values.0.key", (2, None, 4, None, 8)),  # the batch is not the first axis
        ("past_key_values.0.encoder.key", (None, 4, None, 8)),  # what an encoder gave, never empty
        ("hidden", (None, None, 8)),
    ):
        assert roles_of([InputSpec(name, FLOAT, shape)]) == {name: None}
    if not DATA.is_dir():
        pytest.skip("the real models are not here (../shared/data)")
    with pytest.raises(OnnxqError, match="found input 'hidden'"):
        preprocessing = Preprocessing(tokenizer=str(DATA / "language" / "tok512.bin"))
        open_source(text, [tokens, InputSpec("hidden", FLOAT, (None, None, 8))], preprocessing)


def test_perplexity_with_a_cache_is_perplexity_without(shared_data: Path, tmp_path: Path) -> None:
    """The same weights exported with and without a cache: the same perplexity, in float and with int4 weights."""
    from cached_decoder import export, with_weights_of

    language = shared_data / "language"
    cached = export(with_weights_of(language / "stories260k.onnx"), tmp_path / "cached.onnx")
    text = tmp_path / "text.txt"
    text.write_text((language / "tinystories_train_head.txt").read_text()[:12000])
    preprocessing = Preprocessing(tokenizer=str(language / "tok512.bin"), sequence_length=64)
    found = []
    for number, model in enumerate((language / "stories260k.onnx", cached)):
        output = tmp_path / f"{number}.onnx"
        onnxq.quantize(
            model, text, output=output, recipe="int4-weights", weights="int4:32", samples=4,
            preprocess={"tokenizer": preprocessing.tokenizer, "sequence_length": 64},
        )  # fmt: skip
        unseen = language / "tinystories_sample.txt"
        found.append(compare(model, output, unseen, preprocessing=preprocessing, layers=False, latency=False))
    plain, with_cache = found
    assert with_cache.perplexity_float == pytest.approx(plain.perplexity_float, rel=1e-4)
    assert with_cache.perplexity_quantized == pytest.approx(plain.perplexity_quantized, rel=0.01)
    assert with_cache.perplexity_quantized > with_cache.perplexity_float


def test_inputs_of_fixed_lengths_each_have_theirs() -> None:
    """As the encoder and the decoder of a translator, exported for one length each."""
    names = {"input_ids": 6, "attention_mask": 6, "decoder_input_ids": 4, "decoder_position_ids": 8}
    specs = [InputSpec(name, np.dtype(np.int64), (2, length)) for name, length in names.items()]
    feed = text_feed(specs, np.arange(12).reshape(2, 6))
    assert {name: array.shape for name, array in feed.items()} == {name: (2, length) for name, length in names.items()}
    assert feed["decoder_input_ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert feed["decoder_position_ids"].tolist() == [list(range(8))] * 2
    longer = text_feed([InputSpec("input_ids", np.dtype(np.int64), (None, 8))], np.arange(6)[None])
    assert longer["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]


def test_text_is_written_token_by_token_from_the_cache(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, specs = onnxq.load(decoder), specs_of(decoder)
    lengths: list[int] = []
    run = Session.run

    def counted(session: Session, feed: dict[str, np.ndarray], *rest: object) -> list[np.ndarray]:
        lengths.append(feed["input_ids"].shape[1])
        return run(session, feed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "run", counted)
    cached = GeneratedText(model, specs, count=4, seed=1, length=12)
    assert lengths.count(1) >= 11
    assert max(lengths) == 2  # once, to see that two tokens together say the same
    monkeypatch.setattr(GeneratedText, "_paired_caches", lambda self: {})
    whole = GeneratedText(model, specs, count=4, seed=1, length=12)
    assert max(lengths) == 11
    for one, other in zip(cached, whole, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


def test_outputs_that_are_no_cache_are_not_given_back(decoder: Path) -> None:
    model = onnxq.load(decoder)
    outputs = model.graph.outputs
    outputs[1:] = outputs[:0:-1]  # keys and values of other layers, in the caches' places
    written = GeneratedText(model, specs_of(decoder), count=2, seed=1, length=6)
    assert written._caches == {}
    expected = GeneratedText(onnxq.load(decoder), specs_of(decoder), count=2, seed=1, length=6)
    for one, other in zip(written, expected, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
