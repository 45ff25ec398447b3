"""The same bytes whoever does the work, and a worker's death that costs nothing but time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq.analysis import analyze
from onnxq.config import make_settings
from onnxq.errors import OnnxqError
from onnxq.parallel import open_workers
from onnxq.serialized import Serialized, serialize


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Enough samples for four shards."""
    path = tmp_path / "many.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((200, 3, 16, 16)).astype(np.float32))
    return path


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_processes_give_the_bytes_of_one(network: Path, many: Path, tmp_path: Path, target: str) -> None:
    for workers in (1, 3):
        onnxq.quantize(network, many, output=tmp_path / f"{workers}.onnx", target=target, workers=workers)
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "3.onnx").read_bytes()


def test_sensitivities_are_those_of_one(network: Path, many: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        found = analyze(network, many, settings=make_settings({"target": "cpu", "workers": workers}))
        (tmp_path / f"{workers}.json").write_text(json.dumps(found.to_json()))
        onnxq.quantize(network, many, output=tmp_path / f"{workers}.onnx", recipe="mixed", workers=workers)
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_trajectories_are_those_of_one(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[N,4,8,8] sample, int64[N] timestep) => (float[N,4,8,8] noise)
    <float hundred = {100.0}, int64[4] shape = {-1,1,1,1}> {
      c = Conv <pads=[1,1,1,1]> (sample, w)
      f = Cast <to=1> (timestep)  d = Div (f, hundred)  t = Reshape (d, shape)
      a = Add (c, t)  r = Relu (a)
      noise = Conv <pads=[1,1,1,1]> (r, u)
    }
    """
    denoiser = tmp_path / "denoiser.onnx"
    ir.save(add_weights(text, {"w": (32, 4, 3, 3), "u": (4, 32, 3, 3)}), denoiser)
    for workers in (1, 2):
        onnxq.quantize(denoiser, steps=5, target="cpu", workers=workers, output=tmp_path / f"{workers}.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_an_error_in_a_worker_is_the_users_error(network: Path, many: Path) -> None:
    x = np.load(many)["x"]
    x[150] = 3e38  # overflows inside the network
    with pytest.raises(OnnxqError, match="finite activations"):
        onnxq.quantize(network, [{"x": x}], workers=2)


def test_large_initializers_reach_a_worker(network: Path) -> None:
    model = ir.load(network)
    serialized = serialize(model)
    with open_workers(2) as workers:
        assert workers is not None
        shared = workers.share(Serialized(serialized.model, {"a b/c": np.ones(3, np.float32)}, 0))
        assert list(shared._model().large) == ["a b/c"]


def test_ray_cluster_that_loses_a_node_gives_the_same_bytes(network: Path, many: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    onnxq.quantize(network, many, output=tmp_path / "one.onnx")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    slow = SlowSource(many)
    killer = threading.Thread(target=lambda: (slow.half.wait(60), cluster.remove_node(doomed, allow_graceful=False)))
    try:
        cluster.wait_for_nodes()
        killer.start()
        onnxq.quantize(network, slow, output=tmp_path / "ray.onnx", ray="auto")
        killer.join()
        assert not doomed.any_processes_alive(), "no node was killed"
        assert until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, 60), "the cluster never missed it"
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "ray.onnx").read_bytes()


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time: a cluster hears of a death some time after it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class SlowSource:
    """Batches of eight rows that come slowly enough for a node to die between them."""

    def __init__(self, path: Path) -> None:
        self.x = np.load(path)["x"]
        self.half = threading.Event()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.x), 8):
            if start >= len(self.x) // 2:
                self.half.set()
                time.sleep(0.2)
            yield {"x": self.x[start : start + 8]}


def test_address_without_a_cluster(network: Path, many: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(OnnxqError, match="expected a Ray cluster at"):
        onnxq.quantize(network, many, ray="127.0.0.1:1")
