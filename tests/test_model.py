"""Loading, normalising, telling kinds apart, saving."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import add_weights

import onnxq
from onnxq import kinds, serialized
from onnxq import model as models
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.writing import atomic_folder, write_text

SMALL = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
small (float[N,2,4,4] x) => (float[N,2] y)
<float[2,2,1,1] w = {{1.0, 2.0, 3.0, -4.0}}, float[2] b = {{0.5, -0.5}}>
{{
    c = Conv (x, w, b)
    r = Relu (c)
    p = GlobalAveragePool (r)
    y = Flatten (p)
}}
"""


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21, 23])
def test_every_opset_keeps_its_function(opset: int, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    text = SMALL.format(opset=opset, ir=3 if opset < 9 else 8 if opset < 21 else 10)
    proto = onnx.parser.parse_model(text)
    if opset < 9:  # before IR 4 initializers were inputs too
        proto.graph.input.extend(
            onnx.ValueInfoProto(
                name=tensor.name,
                type=onnx.TypeProto(
                    tensor_type=onnx.TypeProto.Tensor(
                        elem_type=1,
                        shape=onnx.TensorShapeProto(
                            dim=[onnx.TensorShapeProto.Dimension(dim_value=size) for size in tensor.dims]
                        ),
                    )
                ),
            )
            for tensor in proto.graph.initializer
        )
    path.write_bytes(proto.SerializeToString())
    loaded = models.load(path)
    assert loaded.graph.opset_imports[""] == max(opset, models.LOWEST_OPSET)
    assert [value.name for value in loaded.graph.inputs] == ["x"]
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    expected = Session(path).run({"x": x})[0]
    np.testing.assert_allclose(Session(loaded).run({"x": x})[0], expected, rtol=1e-6, atol=1e-6)


def test_batchnorm_survives_and_normalising_twice_changes_nothing(network: Path) -> None:
    loaded = models.load(network)
    assert sum(node.op_type == "BatchNormalization" for node in loaded.graph) == 2
    before = ir.to_proto(loaded).SerializeToString(deterministic=True)
    models.normalise(loaded)
    assert ir.to_proto(loaded).SerializeToString(deterministic=True) == before


def test_large_models_go_through_external_data(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    loaded = models.load(network)
    expected = Session(loaded).run(x)[0]
    monkeypatch.setattr(models, "EXTERNAL_DATA_LIMIT_BYTES", 1000)
    saved = models.save(loaded, tmp_path / "big.onnx")
    assert (tmp_path / "big.onnx.data").is_file()
    assert models.file_bytes(saved) > models.initializer_bytes(loaded)
    again = models.load(saved)
    monkeypatch.setattr(serialized, "IN_MEMORY_LIMIT_BYTES", 1000)
    monkeypatch.setattr(serialized, "LARGE_TENSOR_BYTES", 1000)
    made = serialized.serialize(again)
    assert made.large and made.model.ByteSize() < models.initializer_bytes(loaded)
    in_parts = Session(again)
    assert in_parts.in_parts
    np.testing.assert_allclose(in_parts.run(x)[0], expected, rtol=1e-5)


def test_saving_is_whole_or_not_at_all(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load(network)
    first = models.save(loaded, tmp_path / "a.onnx").read_bytes()
    assert models.save(loaded, tmp_path / "b.onnx").read_bytes() == first

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", fail)
    with pytest.raises(OnnxqError, match="No space left"):
        models.save(loaded, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "network.onnx"]


def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_one_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "out[1].json"
    killed = "import pathlib, os, signal, sys; from onnxq.writing import atomic_folder\n"
    killed += "with atomic_folder(pathlib.Path(sys.argv[1])) as folder:\n"
    killed += "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", killed, str(target)], check=False).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and (left[0] / "half").exists()
    with atomic_folder(target) as living:
        write_text(target, "whole")
        assert [*tmp_path.glob(".*")] == [living]
    assert [path.name for path in tmp_path.iterdir()] == [target.name] and target.read_text() == "whole"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("models/resnet20_cifar10", kinds.Kind.CNN),
        ("models/face_rfb320_bn", kinds.Kind.CNN),
        ("models/r20vit_hybrid_cifar10", kinds.Kind.TRANSFORMER),
        ("denoisers/mnist_unet_attention", kinds.Kind.DENOISER),
        ("denoisers/fashion_unet_guided", kinds.Kind.DENOISER),
        ("denoisers/mnist_dit_guided", kinds.Kind.DENOISER),
        ("language/stories260k", kinds.Kind.LANGUAGE),
    ],
)
def test_kinds_of_real_models(name: str, kind: kinds.Kind, shared_data: Path) -> None:
    assert kinds.kind_of(models.load(shared_data / f"{name}.onnx")) is kind


def test_attention_is_seen_behind_a_guard_against_nan_and_behind_qdq() -> None:
    """Exports of scaled_dot_product_attention put Where(IsNaN(p), 0, p) between the Softmax and its product."""
    header = '<ir_version: 10, opset_import: ["": 21]> net (float[2,4,4] s, float[2,4,8] v) => (float[2,4,8] y) '
    guarded = "p = Softmax (s) n = IsNaN (p) q = Where (n, zero, p) y = MatMul (q, v)"
    quantized = "p = Softmax (s) c = QuantizeLinear (p, zero) q = DequantizeLinear (c, zero) y = MatMul (q, v)"
    other = "p = Softmax (s) q = Mul (p, zero) y = MatMul (v, q)"
    for body, kind in (
        (guarded, kinds.Kind.TRANSFORMER),
        (quantized, kinds.Kind.TRANSFORMER),
        (other, kinds.Kind.CNN),
    ):
        model = ir.from_onnx_text(f"{header}<float zero = {{0.0}}> {{ {body} }}")
        assert kinds.kind_of(model) is kind


def test_compressed_weights_are_folded(shared_data: Path) -> None:
    from onnxq import graph as graphs
    from onnxq import layer_nodes

    loaded = models.load(shared_data / "models" / "ppocrv6_rec_tiny.onnx")
    found = list(layer_nodes.weighted_nodes(loaded.graph))
    assert all(item.weight is None or graphs.is_constant(item.weight) for item in found)
    assert sum(item.weight_index is None for item in found) == 0


def test_results_of_models_with_external_data_need_no_other_file(
    network: Path, calibration: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "external"
    folder.mkdir()
    ir.save(ir.load(network), folder / "network.onnx", external_data="weights.bin", size_threshold_bytes=16)
    output = tmp_path / "other" / "out.onnx"
    output.parent.mkdir()
    onnxq.quantize(folder / "network.onnx", calibration, output=output)
    shutil.rmtree(folder)
    assert [file.name for file in output.parent.iterdir()] == ["out.onnx"]
    assert Session(str(output)).run({"x": np.zeros((1, 3, 16, 16), np.float32)})[0].shape == (1, 10)


def test_tensor_whose_bytes_are_not_what_its_shape_says(network: Path) -> None:
    model = onnx.load(network)
    next(item for item in model.graph.initializer if item.dims).dims[0] = 1 << 40
    network.write_bytes(model.SerializeToString())
    with pytest.raises(OnnxqError, match="as many bytes in tensor"):
        models.load(network)


def test_weights_that_are_not_there_are_no_zeros(network: Path) -> None:
    model = onnx.load(network)
    weight = next(item for item in model.graph.initializer if item.name == "w2")
    for field in models.DATA_FIELDS:
        weight.ClearField(field)
    network.write_bytes(model.SerializeToString())
    with pytest.raises(OnnxqError, match=r"tensor 'w2'.*none at all"):
        models.load(network)


SAME_TWICE = """
<ir_version: 8, opset_import: ["" : 17]>
same (float[N,64] x, bool yes) => (float[N,64] y1, float[N,64] y2, float[N,64] t, float[N,64] chosen)
{
    t = MatMul (x, w)
    y1 = Identity (t)
    y2 = Identity (t)
    z = Relu (t)
    chosen = If (yes) <
        then_branch = yes_branch () => (float[N,64] a) { a = Identity (z) },
        else_branch = no_branch () => (float[N,64] b) { b = Neg (z) }
    >
}
"""


def test_outputs_that_are_one_value_keep_their_names_and_branches_their_own_outputs(tmp_path: Path) -> None:
    path = models.save(add_weights(SAME_TWICE, {"w": (64, 64)}), tmp_path / "m.onnx")
    loaded = models.load(path)
    assert [value.name for value in loaded.graph.outputs] == ["y1", "y2", "t", "chosen"]
    feed = {"x": np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32), "yes": np.asarray(True)}
    for one, other in zip(Session(path).run(feed), Session(loaded).run(feed), strict=True):
        np.testing.assert_array_equal(one, other)


SIZES_OF_MINUS_ONE = """
<ir_version: 8, opset_import: ["" : 11]>
free (float[N,3,H,W] x) => (float[N,8] y)
{
    a = Conv (x, w1)
    p = GlobalAveragePool (a)
    f = Flatten (p)
    y = Softmax (f)
}
"""


def test_sizes_of_minus_one_are_free(tmp_path: Path) -> None:
    model = add_weights(SIZES_OF_MINUS_ONE, {"w1": (8, 3, 3, 3)})
    proto = ir.to_proto(model)
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = -1
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype(np.float32)}
    np.testing.assert_allclose(Session(models.load(path)).run(feed)[0], Session(path).run(feed)[0], rtol=1e-5)
