"""Networks that are told the weight of guidance, as a number or as waves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_packing import FLUX, TEXT, conditions_file, flux, net

from onnxq.config import make_settings
from onnxq.diffusion.source import open_sampler


@pytest.mark.parametrize(("rate", "factor"), [(1000.0, 1.0), (1.0, 1000.0)], ids=["parts of 1", "timesteps"])
def test_networks_are_told_the_weight_of_guidance(rate: float, factor: float, tmp_path: Path) -> None:
    """In the units that their time has; they run once, unless there are rows of guidance: then it is the usual one."""
    given: dict[str, object] = {"conditions": conditions_file(tmp_path), "steps": 2}

    def sampler(**more: object) -> tuple[float, float, str]:
        found, line = open_sampler(flux("16", rate=rate), None, make_settings(given | more))
        return found.guidance, float((found.conditions or {})["guidance"][0]), line

    assert sampler()[:2] == (1, 3.5 * factor) and "told of guidance 3.5" in sampler()[2]
    assert sampler(guidance=7.0)[:2] == (1, 7 * factor) and "told of guidance 7" in sampler(guidance=7.0)[2]
    assert sampler(guidance=1.0)[:2] == (1, factor) and sampler(guidance=0.0)[:2] == (1, 0)
    one = np.ones(1, np.float32)
    rows = {"guidance": 3 * one, "guidance.unconditional": one}
    given["conditions"] = conditions_file(
        tmp_path, **rows, **{"encoder_hidden_states.unconditional": np.zeros((TEXT, 8), np.float32)}
    )
    assert sampler(guidance=2.0)[:2] == (2, 3) and "told" not in sampler(guidance=2.0)[2]


def test_guidance_of_rank_0(tmp_path: Path) -> None:
    """And what a file says of it: an array of rank 0 has no rows to count."""
    model = net((FLUX + "float[T,3] img_ids, float[S,3] txt_ids").replace("float[N] guidance", "float guidance"))
    settings = make_settings({"steps": 2, "shapes": {"hidden_states": [1, 16, 16]}})
    for given, wanted in ({}, 3.5), ({"guidance": np.asarray(2, np.float32)}, 2.0):
        path = conditions_file(tmp_path, **given)
        found = open_sampler(model, None, settings.model_copy(update={"conditions": path}))[0].conditions
        assert found is not None and found["guidance"].shape == () and found["guidance"] == wanted


@pytest.mark.parametrize("width", [7, 32])
def test_consistency_models_are_told_as_diffusers_tells_them(width: int, tmp_path: Path) -> None:
    """Of a published width, and of an odd one; in four steps if nobody says how many."""
    pipelines = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net (float[N,4,4,4] sample, int64[N] timestep, float[N,{width}] timestep_cond) => (float[N,4,4,4] out)
    <int64[3] axes = {{1, 2, 3}}, int64[1] last = {{1}}, int64[2] ends = {{2, 3}}>
    {{
        time = Cast <to = 1> (timestep)
        wave = Sin (time)
        whole = Unsqueeze (wave, axes)
        sum = ReduceMean <keepdims = 1> (timestep_cond, last)
        sums = Unsqueeze (sum, ends)
        a = Add (sample, whole)
        out = Add (a, sums)
    }}"""
    scheduler = tmp_path / "scheduler.json"
    scheduler.write_text('{"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear"}')
    for asked, weight in (None, 8.5), (1.0, 1.0), (5.0, 5.0):
        settings = make_settings({"scheduler": str(scheduler), "guidance": asked})
        sampler, line = open_sampler(ir.from_onnx_text(text), None, settings)
        embed = pipelines.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        wanted = embed(None, torch.tensor([weight - 1]), embedding_dim=width).numpy()
        assert sampler.conditions is not None and sampler.guidance == 1 and f"guidance {weight:g}" in line
        np.testing.assert_allclose(sampler.conditions["timestep_cond"], wanted, atol=2e-3)  # of angles up to 7,500
        assert len(sampler.schedule.timesteps) == 4
