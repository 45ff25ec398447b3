"""Bad input through the real command line: two lines, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import add_weights

from onnxq import cli
from onnxq import model as models
from onnxq.autograd.interpreter import TorchGraph
from onnxq.errors import LESS_MEMORY, OnnxqError
from onnxq.runtime import Session

CYCLE = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[1,4] x) => (float[1,4] y) { [first] a = Add(x, b)  [second] b = Relu(a)  [third] y = Relu(b) }
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and standard error of one call in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["onnxq", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, capsys.readouterr().err


def assert_two_lines(code: int, stderr: str, *words: str) -> None:
    assert code == 2, stderr
    lines = stderr.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2, stderr
    assert all(line.startswith("  tip: ") for line in lines[1:]), stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def cut(fraction: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])

    return apply


def parsed(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(onnx.parser.parse_model(text).SerializeToString())


BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "found nothing"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "not onnx": (lambda path: path.write_bytes(os.urandom(5000)), "expected an ONNX model"),
    "text": (lambda path: path.write_text("hello"), "expected"),
    "cut in half": (cut(0.5), "expected"),
    "last byte missing": (cut(0.999), "expected"),
    "cyclic": (parsed(CYCLE), "valid graph"),
    "opset 5": (
        parsed('<ir_version: 3, opset_import: ["" : 5]> g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }'),
        "opset",
    ),
    "unknown op": (
        parsed('<ir_version: 10, opset_import: ["" : 17, "no.such" : 1]> g (float[N,4] x) => (float[N,4] y) '
               "{ y = no.such.Thing(x) }"),
        "expected",
    ),
    "nothing to quantize": (
        parsed('<ir_version: 10, opset_import: ["" : 17]> g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }'),
        "something to quantize",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_models(
    name: str, network: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, word = BROKEN_MODELS[name]
    make(network)
    output = tmp_path / "out"
    output.mkdir()
    data = [] if name == "nothing to quantize" else ["--data", calibration]
    code, stderr = run(capsys, "quantize", network, *data, "-o", output / "o.onnx")
    assert_two_lines(code, stderr, word)
    assert list(output.iterdir()) == []


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def zip_version(data: bytes, version: int) -> bytes:
    """The archive, whose directory says that a later version of zip is needed to read it."""
    places = [place for place in range(len(data) - 4) if data[place : place + 4] == b"PK\x01\x02"]
    for place in places:
        data = data[: place + 6] + bytes([version]) + data[place + 7 :]
    assert places
    return data


def x(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


BROKEN_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong name": (lambda path: np.savez(path, y=x(2, 3, 16, 16)), "expected arrays x"),
    "wrong channels": (lambda path: np.savez(path, x=x(2, 4, 16, 16)), "expected shape [batch, 3"),
    "wrong rank": (lambda path: np.savez(path, x=x(2, 3, 16)), "expected shape"),
    "wrong dtype": (lambda path: np.savez(path, x=np.full((2, 3, 16, 16), "a")), "expected float32"),
    "nan": (lambda path: np.savez(path, x=x(2, 3, 16, 16) + np.nan), "NaN"),
    "infinity": (lambda path: np.savez(path, x=x(2, 3, 16, 16) + np.inf), "infinity"),
    "no rows": (lambda path: np.savez(path, x=x(0, 3, 16, 16)), "number of rows"),
    "unequal rows": (lambda path: np.savez(path, x=x(2, 3, 16, 16), labels=np.arange(3)), "same number of rows"),
    "not an archive": (lambda path: path.write_bytes(b"no"), "cannot be read"),
    "truncated": (cut(0.6), "expected"),
    "another version of zip": (lambda path: path.write_bytes(zip_version(path.read_bytes(), 105)), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_broken_data(
    name: str, network: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, word = BROKEN_DATA[name]
    make(calibration)
    code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", tmp_path / "o.onnx")
    assert_two_lines(code, stderr, word)
    assert not (tmp_path / "o.onnx").exists()


def test_nothing_is_unpickled(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "sprung"
    data = tmp_path / "trap.npz"
    np.savez(data, x=np.array([Trap(trap)], dtype=object))
    trap.unlink(missing_ok=True)
    assert pickle is not None
    code, stderr = run(capsys, "quantize", network, "--data", data, "-o", tmp_path / "o.onnx")
    assert_two_lines(code, stderr, "Python objects", "never unpickles")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--target", "toaster"], "expected a target"),
        (["--recipe", "soup"], "expected a recipe"),
        (["--set", "salt=1"], "expected a knob"),
        (["--set", "observer=5"], "expected str"),
        (["--set", "observer=guess"], "range rule"),
        (["--weights", "int9"], "number format"),
        (["--activations", "uint8"], "TensorRT"),
        (["--weights", "fp8", "--activations", "int8"], "one kind"),
        (["--samples", "0"], "samples"),
        (["--exclude", "nowhere*"], "no match"),
        (["--device", "tpu"], "device"),
    ],
)
def test_bad_settings(
    arguments: list[str],
    word: str,
    network: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", tmp_path / "o.onnx", *arguments)
    assert_two_lines(code, stderr, word)


def test_bad_yaml(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    for text, word in (("[1, 2", "YAML"), ("- a", "names and values"), ("colour: red", "colour")):
        settings.write_text(text)
        code, stderr = run(capsys, "quantize", network, "--config", settings, "-o", tmp_path / "o.onnx")
        assert_two_lines(code, stderr, word)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", "../a\0b"])
def test_external_data_stays_in_the_folder(
    location: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(network)
    onnx.external_data_helper.set_external_data(model.graph.initializer[2], location)
    model.graph.initializer[2].ClearField("raw_data")
    network.write_bytes(model.SerializeToString())
    code, stderr = run(capsys, "quantize", network, "-o", tmp_path / "o.onnx")
    assert_two_lines(code, stderr, "leaves its folder")


def test_external_data_missing_or_short(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx.load(network), network, save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    code, stderr = run(capsys, "quantize", network, "-o", tmp_path / "o.onnx")
    assert_two_lines(code, stderr, "truncated")
    weights.unlink()
    code, stderr = run(capsys, "quantize", network, "-o", tmp_path / "o.onnx")
    assert_two_lines(code, stderr, "found nothing")


def test_unwritable_outputs(
    network: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, word in (
        (tmp_path / "missing" / "o.onnx", "expected a folder"),
        (tmp_path / "file" / "o.onnx", "expected a folder"),
        (tmp_path, "found a folder"),
        (network, "one of the inputs"),
    ):
        code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", output)
        assert_two_lines(code, stderr, word)


def test_a_full_disk_leaves_nothing(
    network: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    output = tmp_path / "out"
    output.mkdir()
    code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", output / "o.onnx")
    assert_two_lines(code, stderr, "No space left")
    assert list(output.iterdir()) == []


def test_quantizing_twice_is_refused(
    network: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = tmp_path / "once.onnx"
    code, stderr = run(capsys, "quantize", network, "--data", calibration, "-o", once, "-q")
    assert code == 0, stderr
    code, stderr = run(capsys, "quantize", once, "--data", calibration, "-o", tmp_path / "twice.onnx")
    assert_two_lines(code, stderr, "quantized already")


def test_memory_that_ran_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime and torch really try to get more than a processor can address; gradients are looked for elsewhere."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    huge (float[4] x, int64[2] shape) => (float[N,4] y)
    {
        [spread] e = Expand (x, shape)
        [sum] y = Add (e, x)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "huge.onnx")
    feed = {"x": np.ones(4, np.float32), "shape": np.array([1 << 45, 4])}
    for run_it in (
        lambda: Session(tmp_path / "huge.onnx").run(feed),
        lambda: TorchGraph(models.load(tmp_path / "huge.onnx")).run(
            {name: torch.from_numpy(array) for name, array in feed.items()}, ["y"]
        ),
    ):
        with pytest.raises(OnnxqError) as caught:
            run_it()
        assert caught.value.hint == LESS_MEMORY, caught.value

    def learn(*, standalone_mode: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(cli, "app", learn)
    assert_two_lines(*run(capsys), "out of memory", "--set batch=")


def test_an_interrupt_is_heard_where_python_drops_exceptions() -> None:
    """One that came in the callback of a weak reference was printed, and the command went on."""
    script = """
        import os, signal, time, weakref
        from onnxq import cli
        class Thing: pass
        def work(**options):
            thing = Thing()
            reference = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.01)))
            del thing
            for _ in range(2000):
                time.sleep(0.01)
        cli.app = work
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.startswith("error: interrupted") and "Traceback" not in done.stderr


def test_an_interrupt_ends_a_command_whose_thread_waits_for_a_lock_that_it_left_taken() -> None:
    """Python's own ``Condition`` is entered by a method, and an exception can come between it and the block."""
    script = """
        import os, signal, tempfile, threading
        from concurrent.futures import ThreadPoolExecutor
        from onnxq import cli
        lock = threading.Lock()
        def work(**options):
            with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
                print(folder, flush=True)
                lock.acquire()
                pool.submit(lock.acquire)
                os.kill(os.getpid(), signal.SIGTERM)
        cli.STILL_WAITING_SECONDS = 0.2
        cli.app = work
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.startswith("error: interrupted") and "Traceback" not in done.stderr
    assert not Path(done.stdout.strip()).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, network: Path, tmp_path: Path) -> None:
    data = tmp_path / "many"  # a minute of calibration
    data.mkdir()
    np.savez_compressed(tmp_path / "part.npz", x=np.zeros((60000, 3, 16, 16), np.float32))
    for index in range(40):
        (data / f"{index}.npz").symlink_to(tmp_path / "part.npz")
    output = tmp_path / "out"
    output.mkdir()
    command = [sys.executable, "-m", "onnxq.cli", "quantize", str(network), "--data", str(data)]
    process = subprocess.Popen([*command, "-o", str(output / "o.onnx")], stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "error: interrupted" in stderr
    assert list(output.iterdir()) == []


def test_a_network_that_is_faster_in_float_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    tiny (float[N,3,8,8] x) => (float[N,4,8,8] y)
    {
        a = Conv (x, w1)
        y = Conv (a, w2)
    }
    """
    path = models.save(add_weights(text, {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)}), tmp_path / "tiny.onnx")
    command = ["quantize", path, "--target", "cpu", "-o", tmp_path / "o.onnx"]
    code, stderr = run(capsys, *command)
    assert_two_lines(code, stderr, "--activations float")
    assert run(capsys, *command, "--activations", "float")[0] == 0
