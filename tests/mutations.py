"""Broken files by the thousand: what a command says about them, and whether it survives.

    python tests/mutations.py --count 10000 --seed 0

Valid models, calibration files, settings, schedules, indexes of subgraphs, side-cars, tokenizers and texts are damaged
at random, in their bytes or in their structure, and given to the real command line inside a child process with bounded
memory. A case fails if the child dies, hangs, prints a traceback, or says anything but an error of at most two lines;
what is left behind must be whole.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import damage
import numpy as np
import onnx
import onnx_ir as ir
from PIL import Image

MEMORY_BYTES = 6 << 30
SAID_EVERY = 500
SECONDS = 180  # beside other work; --seconds gives more where there is much of it

MODEL = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N,3,8,8] x) => (float[N,4] y) <
  float[16,3,3,3] w = {%s}, float[16] one = {%s}, float[16] zero = {%s}, int64[2] shape = {0,-1},
  float[16,16,1,1] v = {%s}, float[4,256] m = {%s}, float[4] bias = {0.0,0.0,0.0,0.0}
> {
  [conv] c = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w)
  [norm] n = BatchNormalization (c, one, zero, zero, one)
  [act] s = Sigmoid (n)  [gate] g = Mul (n, s)  [point] p = Conv (g, v)  [sum] a = Add (p, n)
  [reshape] r = Reshape (a, shape)
  [fc] y = Gemm <transB=1> (r, m, bias)
}
"""

SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_start": 0.0001, "beta_end": 0.02,
    "beta_schedule": "linear", "prediction_type": "epsilon", "clip_sample": True, "steps_offset": 0,
}  # fmt: skip

DENOISER = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N,1,8,8] sample, int64[N] timestep) => (float[N,1,8,8] noise) <
  float[16,1,3,3] w = {%s}, float[1,16,3,3] v = {%s}, float hundred = {100.0}, int64[4] shape = {-1,1,1,1}
> {
  [conv] c = Conv <pads=[1,1,1,1]> (sample, w)
  [cast] f = Cast <to=1> (timestep)  [div] d = Div (f, hundred)  [time] t = Reshape (d, shape)
  [sum] a = Add (c, t)  [act] r = Relu (a)
  [out] noise = Conv <pads=[1,1,1,1]> (r, v)
}
"""

GUIDED = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N,1,8,8] sample, int64[N] timestep, int64[N] y) => (float[N,1,8,8] noise) <
  float[16,1,3,3] w = {%s}, float[1,16,3,3] v = {%s}, float[3,16] classes = {%s}, float hundred = {100.0},
  int64[4] shape = {-1,1,1,1}, int64[4] wide = {-1,16,1,1}
> {
  [conv] c = Conv <pads=[1,1,1,1]> (sample, w)
  [cast] f = Cast <to=1> (timestep)  [div] d = Div (f, hundred)  [time] t = Reshape (d, shape)
  [embed] e = Gather (classes, y)  [widen] k = Reshape (e, wide)
  [sum] a = Add (c, t)  [all] b = Add (a, k)  [act] r = Relu (b)
  [out] noise = Conv <pads=[1,1,1,1]> (r, v)
}
"""

PLAIN = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N,3,8,8] x) => (float[N,16,8,8] y) < float[16,3,3,3] w = {%s}, float[16,16,1,1] v = {%s} > {
  [conv] c = Conv <pads=[1,1,1,1]> (x, w)  [act] r = Relu (c)  [point] y = Conv (r, v)
}
"""

DECODER = """
<ir_version: 10, opset_import: ["" : 17]>
g (int64[N,S] input_ids) => (float[N,S,16] logits) < float[300,16] e = {%s}, float[16,16] w = {%s} > {
  [embed] t = Gather (e, input_ids)  [head] logits = MatMul (t, w)
}
"""

VOCABULARY = {
    "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "once": 1, "upon": 2, "time": 3}, "unk_token": "[UNK]"},
}  # fmt: skip


def corpus(folder: Path) -> None:
    """Write the valid files that get damaged."""
    import onnxq
    from onnxq.calibration import side_car
    from onnxq.calibration.data import input_specs, open_source

    generator = np.random.default_rng(0)

    def numbers(count: int) -> str:
        return ", ".join(f"{value:.3f}" for value in generator.standard_normal(count))

    folder.mkdir(exist_ok=True)
    text = MODEL % (numbers(432), ",".join(["1.0"] * 16), ",".join(["0.0"] * 16), numbers(256), numbers(1024))
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    onnx.save(onnx.parser.parse_model(DENOISER % (numbers(144), numbers(144))), folder / "denoiser.onnx")
    x = generator.standard_normal((4, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=np.arange(4))
    (folder / "denoiser.scheduler.json").write_text(json.dumps(SCHEDULER))
    (folder / "ddim.scheduler.json").write_text(json.dumps(SCHEDULER | {"eta": 1.0}))
    corrected = onnx.load(folder / "denoiser.onnx")
    rows = [{"timestep": time, "slope": 0.1, "mean": [0.0], "deviation": 0.1, "r_squared": 0.9} for time in (66, 33, 0)]
    remembered = {"temporal_timesteps": [66.0, 33.0, 0.0], "noise_correction": rows}
    for key, entry in remembered.items():
        corrected.metadata_props.add(key=f"onnxq.{key}", value=json.dumps(entry))
    onnx.save(corrected, folder / "corrected.onnx")
    noisy = generator.standard_normal((6, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "trajectories.npz", sample=noisy, timestep=np.array([99, 66, 33, 99, 66, 33]))
    onnx.save(onnx.parser.parse_model(GUIDED % (numbers(144), numbers(144), numbers(48))), folder / "guided.onnx")
    np.savez(folder / "conditions.npz", y=np.arange(3))
    for name in ("one", "two"):
        picture = folder / "pictures" / "0" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (9, 11, 3)).astype(np.uint8)).save(picture)
    (folder / "settings.yaml").write_text(
        "recipe: int8\ntarget: cpu\nsamples: 2\nknobs:\n  observer: mse\nexclude: ['conv']\nseed: 3\n"
        "preprocess:\n  mean: [0.5, 0.5, 0.5]\n"
    )
    onnxq.quantize(folder / "model.onnx", folder / "data.npz", output=folder / "quantized.onnx")
    onnx.save(onnx.parser.parse_model(PLAIN % (numbers(432), numbers(256))), folder / "plain.onnx")
    onnxq.quantize(
        folder / "plain.onnx", folder / "data.npz", recipe="multiquant", knobs={"train": False},
        output=folder / "master.onnx",
    )  # fmt: skip
    plain = onnxq.model.load(folder / "plain.onnx")
    recorded = side_car.record(plain, open_source(folder / "data.npz", input_specs(plain)))
    np.savez(folder / "statistics.npz", **recorded)
    onnx.save(onnx.parser.parse_model(DECODER % (numbers(4800), numbers(256))), folder / "decoder.onnx")
    (folder / "text.txt").write_text("once upon a time\nonce upon a time there was — once\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), b" ", b"o", b"n", b"on"]
    packed = b"".join(struct.pack("<fi", -len(piece), len(piece)) + piece for piece in pieces)
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 8) + packed)
    groups = [
        {"file": "denoiser.onnx", "steps": [0, 1], "timesteps": [66.0, 33.0]},
        {"file": "other.onnx", "steps": [2], "timesteps": [0.0]},
    ]
    shutil.copy(folder / "denoiser.onnx", folder / "other.onnx")
    (folder / "all.groups.json").write_text(json.dumps({"weights": None, "groups": groups}))
    external = ir.load(folder / "model.onnx")
    ir.save(external, folder / "external.onnx", external_data="weights.bin", size_threshold_bytes=64)


# What is damaged, and the commands that read it; {m} is the damaged file, {d} the folder of valid ones.
USES: dict[str, list[str]] = {
    "model.onnx": [
        "quantize {m} --data {d}/data.npz -o {o}/out.onnx",
        "quantize {m} --data {d}/data.npz -o {o}/out.onnx --target cpu",
        "quantize {m} --recipe rex -o {o}/out.onnx",
        "lint {m}",
        "compare {d}/model.onnx {m} --data {d}/data.npz --no-latency",
    ],
    "external.onnx": ["quantize {m} --data {d}/data.npz -o {o}/out.onnx"],
    "weights.bin": ["quantize {d}/external.onnx --data {d}/data.npz -o {o}/out.onnx"],
    "quantized.onnx": [
        "lint {m}",
        "lint {m} --target cpu",
        "lint {m} --fix {o}/out.onnx",
        "strip {m} -o {o}/out.onnx",
        "compare {d}/model.onnx {m} --data {d}/data.npz --no-latency",
    ],
    "denoiser.onnx": [
        "quantize {m} --scheduler {d}/denoiser.scheduler.json --steps 3 -n 4 --target cpu -o {o}/out.onnx"
    ],
    "denoiser.scheduler.json": [
        "quantize {d}/denoiser.onnx --scheduler {m} --steps 3 -n 4 --target cpu -o {o}/out.onnx"
    ],
    "all.groups.json": [
        "sample {m} --scheduler {d}/denoiser.scheduler.json --steps 3 -n 2 -o {o}/out.png",
        "sample {m} --against {d}/denoiser.onnx --steps 3 -n 2 -o {o}/out.png",
    ],
    "corrected.onnx": ["sample {m} --scheduler {d}/ddim.scheduler.json --steps 3 -n 2 -o {o}/out.png"],
    "master.onnx": ["export {m} --bits 4 -o {o}/out.onnx", "lint {m} --fix {o}/out.onnx --target cpu"],
    "other.onnx": ["sample {d}/all.groups.json --scheduler {d}/denoiser.scheduler.json --steps 3 -n 2 -o {o}/out.png"],
    "plain.onnx": [
        "analyze {m} --data {d}/data.npz",
        "statistics {m} --data {d}/data.npz -o {o}/out.npz",
        "quantize {m} --statistics {d}/statistics.npz --synthesis noise -o {o}/out.onnx",
    ],
    "statistics.npz": [
        "synthesize {d}/plain.onnx --statistics {m} --steps 2 -n 2 -o {o}/out.npz",
        "synthesize {d}/plain.onnx --statistics {m} --method zeroq --steps 1 -n 1 -o {o}/out.npz",
    ],
    "decoder.onnx": [
        "quantize {m} --data {d}/text.txt --tokenizer {d}/tokenizer.json --sequence-length 4 -o {o}/out.onnx"
    ],
    "tokenizer.json": [
        "quantize {d}/decoder.onnx --data {d}/text.txt --tokenizer {m} --sequence-length 4 -o {o}/out.onnx"
    ],
    "tokenizer.bin": [
        "quantize {d}/decoder.onnx --data {d}/text.txt --tokenizer {m} --sequence-length 4 -o {o}/out.onnx"
    ],
    "text.txt": [
        "quantize {d}/decoder.onnx --data {m} --tokenizer {d}/tokenizer.bin --sequence-length 4 -o {o}/out.onnx"
    ],
    "data.npz": [
        "statistics {d}/plain.onnx --data {m} -o {o}/out.npz",
        "quantize {d}/model.onnx --data {m} -o {o}/out.onnx",
        "compare {d}/model.onnx {d}/quantized.onnx --data {m} --no-latency",
    ],
    "trajectories.npz": ["quantize {d}/denoiser.onnx --data {m} --target cpu -o {o}/out.onnx"],
    "settings.yaml": [
        "quantize {d}/model.onnx --data {d}/data.npz --config {m} -o {o}/out.onnx",
        "compare {d}/model.onnx {d}/quantized.onnx --data {d}/data.npz --config {m} --no-latency",
    ],
    "pictures/0/one.png": [
        "quantize {d}/model.onnx --data {d}/pictures -o {o}/out.onnx",
        "compare {d}/model.onnx {d}/quantized.onnx --data {d}/pictures --no-latency",
    ],
    "conditions.npz": [
        "quantize {d}/guided.onnx --conditions {m} --scheduler {d}/denoiser.scheduler.json --steps 3 -n 4 --target cpu "
        "-o {o}/out.onnx"
    ],
}


def cases(folder: Path, seed: int, start: int, count: int) -> Iterator[tuple[int, str, str, bytes]]:
    """Number, name of the damaged file, command, and its bytes; the same for the same seed."""
    for number in range(start, start + count):
        chance = random.Random(f"{seed} {number}")
        name = chance.choice(list(USES))
        data = (folder / name).read_bytes()
        yield number, name, chance.choice(USES[name]), chance.choice(damage.ways(name))(data, chance)


def run_case(folder: Path, name: str, command: str, data: bytes) -> str:
    """What is wrong about how the command took the damaged file; empty if nothing is."""
    from onnxq import cli

    with tempfile.TemporaryDirectory() as place:
        damaged, out = Path(place) / "in", Path(place) / "out"
        shutil.copytree(folder, damaged)
        out.mkdir()
        (damaged / name).write_bytes(data)
        text = command.format(m=damaged / name, d=damaged, o=out)
        before = {path: path.stat().st_mtime_ns for path in damaged.rglob("*")}
        stdout, stderr = io.StringIO(), io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            sys.argv = ["onnxq", *text.split()]
            try:
                cli.main()
            except SystemExit as error:
                code = error.code or 0
            except BaseException:  # noqa: BLE001  (also what is no Exception must not come out)
                return traceback.format_exc()
        said = [line for line in stderr.getvalue().splitlines() if line.startswith(("error", "  tip", "Traceback"))]
        if "Traceback" in stderr.getvalue():
            return stderr.getvalue()
        if code not in (0, 1, 2):
            return f"exit code {code}: {stderr.getvalue()}"
        if code == 2 and not (1 <= len(said) <= 2 and said[0].startswith("error: ")):
            return f"no two-line error: {stderr.getvalue()!r}"
        if "defect of onnxq" in stderr.getvalue():
            return stderr.getvalue()
        if before != {path: path.stat().st_mtime_ns for path in damaged.rglob("*")}:
            return "something was written beside the input"
        left = [path.name for path in out.iterdir()]
        if left and (code == 2 or any(not name.startswith("out.") for name in left)):
            return f"left behind with exit code {code}: {left}"
        for path in out.glob("*.onnx"):
            onnx.checker.check_model(onnx.load(path))
    return ""


def child(folder: Path, seed: int, start: int, count: int) -> None:
    """Run cases in this process; each result is one line of JSON on the real standard output."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number, name, command, data in cases(folder, seed, start, count):
        out.write(json.dumps({"begin": number, "command": f"{name}: {command}"}) + "\n")
        out.write(json.dumps({"end": number, "wrong": run_case(folder, name, command, data)}) + "\n")


def run(
    folder: Path, seed: int, start: int, count: int, report: Callable[[str], None], seconds: int = SECONDS
) -> list[str]:
    """Run cases in children that may die; returns what went wrong, and says it, and how far it is, at once."""
    wrong: list[str] = []
    number, stop = start, start + count
    while number < stop:
        arguments = ["--child", str(folder), "--seed", str(seed), "--start", str(number), "--count", str(stop - number)]
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        begun, command = number, ""
        killed = threading.Event()
        alive = [time.monotonic()]

        def watch(process: subprocess.Popen[str] = process, alive: list[float] = alive,
                  killed: threading.Event = killed) -> None:  # fmt: skip
            while process.poll() is None:
                if time.monotonic() - alive[0] > seconds:
                    killed.set()
                    process.kill()
                time.sleep(0.5)

        threading.Thread(target=watch, daemon=True).start()
        complaints = io.StringIO()
        threading.Thread(target=lambda s=process.stderr, c=complaints: c.write(s.read()), daemon=True).start()
        for line in process.stdout:
            alive[0] = time.monotonic()
            entry = json.loads(line)
            if "begin" in entry:
                begun, command = entry["begin"], entry["command"]
                continue
            number = entry["end"] + 1
            if (number - start) % SAID_EVERY == 0:
                report(f"{number - start} of {count} damaged inputs, {len(wrong)} failures")
            if entry["wrong"]:
                wrong.append(f"case {entry['end']} ({command}): {entry['wrong']}")
                report(wrong[-1])
        code = process.wait()
        if number < stop:
            how = f"hung for {seconds} s" if killed.is_set() else f"died ({signal_name(code)})"
            wrong.append(f"case {begun} ({command}): {how} {complaints.getvalue()[-400:]}")
            report(wrong[-1])
            number = begun + 1
    return wrong


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="what no case may take longer than")
    parser.add_argument("--child", type=Path, help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seed, arguments.start, arguments.count)
        return
    with tempfile.TemporaryDirectory() as place:
        corpus(Path(place))
        before = time.monotonic()
        wrong = run(
            Path(place),
            arguments.seed,
            arguments.start,
            arguments.count,
            lambda line: print(line, flush=True),
            arguments.seconds,
        )
    hung = sum("): hung for" in line for line in wrong)
    print(
        f"{arguments.count} damaged inputs, {len(wrong) - hung} failures, {hung} over {arguments.seconds} s, "
        f"{time.monotonic() - before:.0f} s"
    )
    print(Counter(line.split("(")[1].split(":")[0] for line in wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
