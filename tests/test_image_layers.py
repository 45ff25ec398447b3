"""Layers that make most of the images' error are spared: in float, or with wide weights among narrow ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from test_denoiser_biases import image_error as measured
from test_step_floor import chain, job_of

from onnxq.calibration import observers
from onnxq.diffusion.image_layers import error_shares, image_error, spare_for_images
from onnxq.diffusion.sparing import SparingSearch
from onnxq.sensitivity import ErrorPower


def test_errors_count_by_what_they_do_to_images() -> None:
    power = ErrorPower()
    signal = np.ones((3, 4))
    power.add([signal], [signal + np.asarray([[0.1], [0.2], [0.0]])], np.arange(3))
    assert error_shares(power, np.asarray([5.0, 0.5, 9.0])) == pytest.approx({0: 0.05, 1: 0.02, 2: 0.0})


@pytest.mark.parametrize(
    ("fragile", "gain_db", "kept"), [((3,), 2.0, {"layer3"}), ((3,), 60.0, set()), ((), 2.0, set())]
)
def test_a_layer_that_makes_most_of_the_error_stays_float(
    fragile: tuple[int, ...], gain_db: float, kept: set[str]
) -> None:
    job, _ = job_of(chain(fragile))
    found = spare_for_images(job, observers.get("minmax"), None, np.ones(4), gain_db)
    assert set(job.exceptions) == kept == set(job.reasons) == set(found.layers)
    assert found.error > 0 and (found.error < 0.1) == bool(kept or not fragile)


def spoil(model: ir.Model, index: int, largest: float) -> None:
    """Beside the weight of a dead channel, the others of a layer's rows fall between the codes of six bits."""
    names = [f"w{index - 1}", f"w{index}"]
    dead, spoilt = (np.array(model.graph.initializers[name].const_value.numpy()) for name in names)
    dead[5] = 0
    spoilt[:, 5] = largest * np.abs(spoilt).max()
    for name, array in zip(names, (dead, spoilt), strict=True):
        model.graph.initializers[name].const_value = ir.tensor(array)


@pytest.mark.parametrize(("largest", "kept"), [(40.0, ["layer3"]), (1.0, [])])
def test_a_layer_that_few_bits_spoil_keeps_eight(largest: float, kept: list[str]) -> None:
    model = chain(())
    spoil(model, 3, largest)
    job, _ = job_of(model, weights="int6")
    wide = job.target.scheme(None, None)
    found = spare_for_images(job, observers.get("minmax"), None, np.ones(4), 2.0, wide)
    assert found.layers == kept and job.exceptions == dict.fromkeys(kept, wide) and not job.reasons


def test_what_sparing_does_not_change_is_no_reason_to_spare() -> None:
    """The layer whose input loses most is first where it would be in float, and not where its weights would be wide."""
    model = chain((3,))
    spoil(model, 17, 20.0)
    job, _ = job_of(model, weights="int6")
    first = []
    for scheme in (None, job.target.scheme(None, None)):
        search = SparingSearch(job, observers.get("minmax"), None, scheme)
        search.rank([0, 1, 2, 3], lambda power: image_error(power, np.ones(4)))
        first += search.ranking.first(1)
    assert first == ["layer3", "layer17"]


def test_a_few_layers_of_eight_bits_halve_the_error_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real UNet with nearest rounding: what would be learned takes most of the time here."""
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    from onnxq.recipes import diffusion

    monkeypatch.setattr(diffusion, "reconstruct", lambda *_, **__: None)
    knobs = {"trajectories": 4, "kept_steps": 5, "start": "nearest", "split": "none"}
    knobs |= {"correct": False, "step_floor_db": 0.0, "image_gain_db": 0.0}
    wide, narrow = (measured("diffusion", wide_gain_db=gain, **knobs) for gain in (0.5, 0.0))
    assert wide < 0.5 * narrow
