"""How far the channels of attention's queries and keys spread in a token, on average over the calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.calibration.data import batches, inputs_of, row_count
from onnxq.calibration.recording import HELD_BYTES_PER_BATCH, bytes_of_one, rows_at_once
from onnxq.job import Job
from onnxq.passes.normalise_attention import Operand
from onnxq.runtime import Session

ROWS, SAMPLES = 16, 64


def token_deviations(job: Job, items: Sequence[Operand]) -> dict[str, float]:
    """The standard deviation over channels, averaged over tokens, heads, samples and steps, by name of the value."""
    names = list(dict.fromkeys(item.value.name or "" for item in items))
    axes = {item.value.name or "": item.axis for item in items}
    if not names:
        return {}
    session = Session(job.model, taps=names, device=job.settings.device)
    sums, rows = dict.fromkeys(names, 0.0), 0
    size = rows_at_once(bytes_of_one(session, names, job.source, job.specs), ROWS, HELD_BYTES_PER_BATCH)
    for batch in batches(job.source, job.specs, batch_size=size, samples=SAMPLES):
        feed = inputs_of(batch, job.specs)
        count = row_count(feed, job.specs)
        for name, value in zip(names, session.run(feed, names), strict=True):
            sums[name] += count * float(np.mean(np.std(value, axis=axes[name], dtype=np.float64)))
        rows += count
    return {name: total / rows for name, total in sums.items() if total > 0}
