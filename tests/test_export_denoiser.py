"""The exporter of denoisers: the schedule travels with the model, and roles are found again."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODELS

from onnxq import model as models
from onnxq.diffusion import denoiser as denoisers
from onnxq.diffusion.schedule_file import read_schedule

SCRIPT = MODELS / "export_denoiser.py"


def test_a_unet_keeps_its_schedule_and_its_group_norms(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the exporter needs torch: pip install 'onnxq[diffusion]'")
    diffusers = pytest.importorskip("diffusers", reason="the exporter needs diffusers: pip install 'onnxq[diffusion]'")
    specification = importlib.util.spec_from_file_location("export_denoiser", SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11,
    )  # fmt: skip
    output = tmp_path / "denoiser.onnx"
    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 300, "skip_prk_steps": True}
    script.export(network, config, output, 8, 77)
    assert b"site-packages" not in output.read_bytes()  # the exporter notes where each line of torch lies
    model = models.load(output)
    found = denoisers.find(model)
    assert (found.sample.name, found.timestep.name, found.output) == ("sample", "timestep", "prediction")
    assert [(item.spec.name, item.null_class) for item in found.conditions] == [("class_labels", 10)]
    assert found.sample.batch is None
    read, line = read_schedule(None, model, output, found)
    assert read == config and "metadata" in line
    assert any(node.op_type == "GroupNormalization" for node in model.graph)


def test_a_folder_that_is_no_pipeline_is_two_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "-o", tmp_path / "out.onnx"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [line[:6] for line in done.stderr.strip().splitlines()[-2:]] == ["error:", "  tip:"]
    assert not (tmp_path / "out.onnx").exists()
