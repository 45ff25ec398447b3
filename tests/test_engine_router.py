"""Engines for groups of steps behind the interface of the router: what is said without a GPU, what runs with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

from onnxq.cli import app
from onnxq.diffusion.router import Router
from onnxq.engines.execute import EngineSession
from onnxq.engines.groups import build_groups
from onnxq.engines.runtimes import gpu_sm
from onnxq.errors import OnnxqError

DENOISER = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2,16,8,8] sample, float[2] timestep) => (float[2,16,8,8] noise) <int64[4] shape = {2,1,1,1}> {
  [conv] c = Conv <pads=[1,1,1,1]> (sample, w)
  [time] t = Reshape (timestep, shape)
  [sum] noise = Add (c, t)
}
"""
without_gpu = pytest.mark.skipif(gpu_sm() is not None, reason="there is a GPU: the engines would run")
with_gpu = pytest.mark.skipif(gpu_sm() is None, reason="no GPU to run engines on")


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    entries = []
    for number in (0, 1):
        ir.save(add_weights(DENOISER, {"w": (16, 16, 3, 3)}, seed=number), tmp_path / f"unet.group{number}.onnx")
        entries.append({"file": f"unet.group{number}.onnx", "steps": [number], "timesteps": [9.0 - 9 * number]})
    index = tmp_path / "unet.groups.json"
    index.write_text(json.dumps({"groups": entries}))
    return index


def engines(graphs: Path, **changed: object) -> Path:
    """An index as ``build_groups`` writes it, with files in the place of engines."""
    folder = graphs.parent / "engines"
    folder.mkdir()
    entries = json.loads(graphs.read_text())["groups"]
    for entry in entries:
        entry |= {"file": f"../{entry['file']}", "engine": f"{Path(entry['file']).stem}.engine"}
        entry |= {"runtime": "tensorrt-rtx"} | changed
        (folder / entry["engine"]).write_bytes(b"no engine")
    index = folder / graphs.name
    index.write_text(json.dumps({"groups": entries}))
    return index


@without_gpu
def test_engines_without_a_gpu_are_refused_with_what_runs_instead(graphs: Path) -> None:
    with pytest.raises(OnnxqError, match="expected an NVIDIA GPU") as caught:
        Router(engines(graphs))
    assert "groups.json" in caught.value.hint and "onnxruntime" in caught.value.hint
    with pytest.raises(OnnxqError, match="expected an NVIDIA GPU"):
        EngineSession(graphs, "tensorrt-rtx")
    assert len(Router(graphs).files) == 2  # the index of the graphs runs here


@pytest.mark.parametrize("changed", [{"runtime": "other"}, {"runtime": None}])
def test_an_index_of_engines_of_no_known_runtime_is_refused(graphs: Path, changed: dict[str, object]) -> None:
    with pytest.raises(OnnxqError, match="groups"):
        Router(engines(graphs, **changed))


@with_gpu
def test_engines_predict_what_the_graphs_do(graphs: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = graphs.parent / "engines"
    build_groups(graphs, folder, runtime="tensorrt-rtx")
    on_gpu, reference = Router(folder / graphs.name), Router(graphs)
    sample = np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32)
    for time in (9.0, 0.0):
        np.testing.assert_allclose(on_gpu.predict(sample, time), reference.predict(sample, time), rtol=1e-2, atol=1e-2)


INTEGERS = "f = Cast <to=1> (timestep)  [time] t = Reshape (f, shape)"


@pytest.mark.parametrize(
    ("old", "new"), [("[2,16,8,8]", "[2,16,4,4]"), ("noise", "velocity"), ("float[2] t", "int64[2] t")]
)
def test_graphs_of_another_denoiser_are_refused_before_anything_runs(graphs: Path, old: str, new: str) -> None:
    text = DENOISER.replace(old, new)
    if new.startswith("int64"):
        text = text.replace("[time] t = Reshape (timestep, shape)", INTEGERS)
    ir.save(add_weights(text, {"w": (16, 16, 3, 3)}), graphs.parent / "unet.group1.onnx")
    with pytest.raises(OnnxqError, match=r"in unet\.group1\.onnx as in unet\.group0\.onnx"):
        Router(graphs)


def test_the_command_builds_an_engine_for_each_group_of_steps(graphs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines need TensorRT-RTX: pip install 'onnxq[tensorrt]'")
    folder, numbers, page = (graphs.parent / name for name in ("engines", "numbers.json", "page.html"))
    app(["build", *map(str, (graphs, "-o", folder, "--json", numbers, "--report", page))], standalone_mode=False)
    entries = json.loads((folder / graphs.name).read_text())["groups"]
    assert [entry["steps"] for entry in entries] == [[0], [1]]
    assert all((folder / entry["engine"]).stat().st_size > 1000 for entry in entries)
    assert (
        len(json.loads(numbers.read_text())["engines"]) == 2
        and page.read_text().count("<h2>Products in unet.group") == 2
    )
    assert "which engine serves which steps" in capsys.readouterr().out
