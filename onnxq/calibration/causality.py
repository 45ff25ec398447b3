"""Does a model that reads tokens see what comes after each? Encoders do, decoders do not; their graphs look alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxq.calibration.data import InputSpec, fixed_batch
from onnxq.calibration.random_tokens import vocabulary_size
from onnxq.calibration.text import fixed_length, roles_of, text_feed
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

LENGTH = 8
TOLERANCE = 1e-3  # of the largest output; another last token moves what an encoder says far more


def is_causal(model: ir.Model, specs: Sequence[InputSpec]) -> bool:
    """Whether the outputs at a position depend on the tokens up to it alone, as those of a decoder do.

    A model for which that cannot be found out by trying is none.

    Args:
        model: A float model.
        specs: Its inputs.
    """
    return sees_what_follows(model, specs) is False


def sees_what_follows(model: ir.Model, specs: Sequence[InputSpec], session: Session | None = None) -> bool | None:
    """Whether the outputs at a position depend on later tokens too, as those of an encoder do.

    Found by trying: two sequences that differ in their last token.

    Args:
        model: A float model.
        specs: Its inputs.
        session: Of the model, where there is one.

    Returns:
        ``None`` where it cannot be tried: of a model that tells segments apart, whose first output is not one row for
        each token, that reads what text does not give, or does not run on random tokens.
    """
    shape = model.graph.outputs[0].shape
    if shape is None or len(shape) != 3 or {"segments", None} & set(roles_of(specs).values()):
        return None
    known = vocabulary_size(model, specs) or 2
    length = fixed_length(specs) or LENGTH
    batch = fixed_batch(specs) or 1
    tokens = np.random.default_rng(0).integers(0, known, (batch, length))
    other = tokens.copy()
    other[:, -1] = (tokens[:, -1] + max(known // 2, 1)) % known
    session = session or Session(model)
    name = session.output_names[:1]
    try:
        first, second = (session.run(text_feed(specs, rows), name)[0].astype(np.float64) for rows in (tokens, other))
    except OnnxqError:
        return None
    if first.shape[:2] != tokens.shape or length < 2:
        return None
    moved = np.abs(first - second)[:, :-1].max()
    return bool(moved > TOLERANCE * np.abs(first).max())


def writes_text(model: ir.Model, specs: Sequence[InputSpec]) -> bool:
    """Whether the model scores every token that may follow, rather than describing those that it reads.

    It does not where it scores something else than its own vocabulary, or has seen what follows.
    """
    known = vocabulary_size(model, specs)
    shape = model.graph.outputs[0].shape
    scored = None if shape is None or len(shape) == 0 else shape[-1]
    if known is not None and isinstance(scored, int) and scored != known:
        return False
    return is_causal(model, specs)
