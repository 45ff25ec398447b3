"""Calibration data is streamed, checked and batched."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxq.calibration import data
from onnxq.errors import OnnxqError

SPEC = data.InputSpec("x", np.dtype(np.float32), (None, 3, 8, 8))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_equal_the_arrays(save: object, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    save(tmp_path / "d.npz", x=x, labels=np.arange(5), other=np.ones(2))  # type: ignore[operator]
    source = data.open_source(tmp_path / "d.npz", [SPEC])
    assert len(source) == 5
    rows = list(source)
    np.testing.assert_array_equal([row["x"] for row in rows], x)
    assert [int(row["labels"]) for row in rows] == [0, 1, 2, 3, 4]


def test_batches_keep_the_last_one_and_stop_at_samples() -> None:
    source = data.open_source([{"x": np.zeros((5, 3, 8, 8), np.float32)}], [SPEC])
    assert [len(feed["x"]) for feed in data.batches(source, [SPEC], batch_size=2)] == [2, 2, 1]
    assert [len(feed["x"]) for feed in data.batches(source, [SPEC], batch_size=2, samples=3)] == [2, 1]


def test_a_fixed_batch_drops_what_does_not_fill_it_but_never_everything() -> None:
    fixed = data.InputSpec("x", np.dtype(np.float32), (4, 3, 8, 8))
    source = data.open_source([{"x": np.zeros((6, 3, 8, 8), np.float32)}], [fixed])
    assert [len(feed["x"]) for feed in data.batches(source, [fixed])] == [4]
    assert [len(feed["x"]) for feed in data.batches(source, [fixed], samples=3)] == [4]


def test_scalar_inputs_are_not_stacked() -> None:
    scalar = data.InputSpec("t", np.dtype(np.int64), (), is_whole=True)
    source = data.open_source([{"x": np.zeros((2, 3, 8, 8), np.float32), "t": np.arange(2)}], [SPEC, scalar])
    feeds = list(data.batches(source, [SPEC, scalar], batch_size=8))
    assert [(feed["x"].shape[0], feed["t"].shape, int(feed["t"])) for feed in feeds] == [(1, (), 0), (1, (), 1)]


def test_rows_of_different_shapes_are_an_error() -> None:
    free = data.InputSpec("x", np.dtype(np.float32), (None, None))
    source = data.open_source([{"x": np.zeros((1, 3), np.float32)}, {"x": np.zeros((1, 4), np.float32)}], [free])
    with pytest.raises(OnnxqError, match="one shape"):
        list(data.batches(source, [free], batch_size=2))


def test_image_folders_give_pixels_and_labels(tmp_path: Path) -> None:
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 30), (255 * index, 0, 0)).save(tmp_path / name / "a.png")
    settings = data.Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
    rows = list(data.open_source(tmp_path, [SPEC], settings))
    assert [int(row["labels"]) for row in rows] == [0, 1]
    assert rows[1]["x"].shape == (3, 8, 8)
    np.testing.assert_allclose(rows[1]["x"][0], 1.0)
    (tmp_path / "dog" / "b.png").write_text("not an image")
    with pytest.raises(OnnxqError, match="expected an image"):
        list(data.open_source(tmp_path, [SPEC], settings))


def test_memory_does_not_grow_with_samples(tmp_path: Path) -> None:
    peaks = []
    for count in (64, 1024):
        path = tmp_path / f"{count}.npz"
        np.savez(path, x=np.zeros((count, 3, 8, 8), np.float32))
        tracemalloc.start()
        for _ in data.batches(data.open_source(path, [SPEC]), [SPEC], batch_size=4):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_batches_share_what_has_no_axis_and_agree_on_their_rows() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    source = data.Iterables([{"t": np.asarray(7), "x": x}, {"t": np.asarray([1]), "x": x[:1]}])
    assert len(source) == 4
    assert [int(sample["t"]) for sample in source] == [7, 7, 7, 1]
    assert [sample["x"].tolist() for sample in source] == [*x.tolist(), x[0].tolist()]
    with pytest.raises(OnnxqError, match="2 of t, 3 of x"):
        list(data.Iterables([{"t": np.zeros(2), "x": x}]))


def test_one_row_serves_all_samples_where_the_model_reads_no_more(tmp_path: Path) -> None:
    """The zero state of a recurrent network, or a flag, beside inputs whose batch is free."""
    x, state = np.zeros((4, 3, 8, 8), np.float32), np.full((1, 1, 2), 5.0, np.float32)
    specs = [SPEC, data.InputSpec("state", np.dtype(np.float32), (1, 1, 2))]
    np.savez(tmp_path / "d.npz", x=x, state=state)
    for source in (data.open_source(tmp_path / "d.npz", specs), data.Iterables([{"x": x, "state": state}], specs)):
        assert len(source) == 4
        assert [sample["state"].tolist() for sample in source] == [state[0].tolist()] * 4
        assert [batch["state"].shape for batch in data.batches(source, specs)] == [(1, 1, 2)] * 4
    alone = data.Iterables([{"state": state}], specs[1:])
    assert len(alone) == 1
    np.savez(tmp_path / "two.npz", x=x, state=state.repeat(2, 0))
    with pytest.raises(OnnxqError, match="same number of rows"):
        data.open_source(tmp_path / "two.npz", specs)


@pytest.mark.parametrize(("name", "size"), [("strip", (1, 60000)), ("cut", (8, 8))])
def test_images_that_cannot_be_read_are_named(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """A strip whose crop would take gigabytes, and a file whose header is cut off."""
    file = tmp_path / f"{name}.png"
    Image.new("RGB", size).save(file)
    if name == "cut":
        content = bytearray(file.read_bytes())
        content[8:12] = (3).to_bytes(4, "big")  # what the header says of its own length
        file.write_bytes(content)
    source = data.open_source(tmp_path, [data.InputSpec("x", np.dtype(np.float32), (None, 3, 4096, 4096))])
    with pytest.raises(OnnxqError, match=rf"expected an image.*{file.name}"):
        next(iter(source))


def test_a_size_that_no_array_can_have_is_refused(tmp_path: Path) -> None:
    """Of no elements at all, so that nothing is too large."""
    path = tmp_path / "damaged.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 70, 0)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(OnnxqError, match="sizes of an array"):
        data.open_source(path, [SPEC])
