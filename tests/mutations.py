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

import numpy as np
import onnx
import onnx_ir as ir

MEMORY_BYTES = 6 << 30
SECONDS = 180  # beside other work; --seconds gives more where there is much of it
INTERESTING = (0, 1, -1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))

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
    (folder / "settings.yaml").write_text(
        "recipe: int8\ntarget: cpu\nsamples: 2\nknobs:\n  observer: mse\nexclude: ['conv']\nseed: 3\n"
        "preprocess:\n  mean: [0.5, 0.5, 0.5]\n"
    )
    onnxq.quantize(folder / "model.onnx", folder / "data.npz", output=folder / "quantized.onnx")
    onnx.save(onnx.parser.parse_model(PLAIN % (numbers(432), numbers(256))), folder / "plain.onnx")
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
        "quantize {d}/model.onnx --data {m} -o {o}/out.onnx",
        "compare {d}/model.onnx {d}/quantized.onnx --data {m} --no-latency",
    ],
    "settings.yaml": ["quantize {d}/model.onnx --data {d}/data.npz --config {m} -o {o}/out.onnx"],
}


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few random edits of the bytes."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        place, length = chance.randrange(len(changed) + 1), chance.choice([1, 1, 2, 4, 8, 64, 1024])
        kind = chance.randrange(7)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = chance.randbytes(length)
        elif kind == 4:
            other = chance.randrange(len(changed) + 1)
            changed[place:place] = changed[other : other + length]
        elif kind == 5:
            del changed[place:]
        else:
            number = chance.choice(INTERESTING) % 2**64
            size = chance.choice([1, 4, 8])
            changed[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, chance.choice(["little", "big"]))
    return bytes(changed)


def damage_model(data: bytes, chance: random.Random) -> bytes:
    """A model whose structure is wrong, though it parses."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.initializer)] + [
        n for node in graph.node for n in node.output
    ]
    for _ in range(chance.choice([1, 1, 2, 5])):
        node = chance.choice(graph.node)
        kind = chance.randrange(12)
        if kind == 0 and node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice([*names, "", "nowhere"])
        elif kind == 1:
            node.op_type = chance.choice(
                ["Relu", "Conv", "Loop", "If", "QuantizeLinear", "Nothing", "Constant", "Concat"]
            )
        elif kind == 2 and node.attribute:
            attribute = chance.choice(node.attribute)
            if attribute.ints:
                attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(INTERESTING)
            else:
                attribute.i = chance.choice(INTERESTING)
        elif kind == 3 and graph.initializer:
            tensor = chance.choice(graph.initializer)
            if tensor.dims and chance.random() < 0.7:
                tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(INTERESTING)
            else:
                tensor.dims.append(chance.choice(INTERESTING))
        elif kind == 4 and graph.initializer:
            chance.choice(graph.initializer).data_type = chance.randrange(26)
        elif kind == 5:
            value = chance.choice([*graph.input, *graph.output])
            sizes = value.type.tensor_type.shape.dim
            if sizes:
                sizes[chance.randrange(len(sizes))].dim_value = chance.choice(INTERESTING)
        elif kind == 6:
            value = chance.choice([*graph.input, *graph.output])
            value.type.tensor_type.elem_type = chance.randrange(26)
        elif kind == 7:
            graph.node.append(chance.choice(graph.node))
        elif kind == 8:
            graph.node.remove(node)
        elif kind == 9 and node.output:
            node.output[0] = chance.choice([*names, ""])
        elif kind == 10 and graph.initializer:
            graph.initializer.remove(chance.choice(graph.initializer))
        elif model.opset_import:
            model.opset_import[0].version = chance.choice([*range(1, 30), *(n for n in INTERESTING if abs(n) < 2**62)])
        if not graph.node:
            break
    return model.SerializeToString()


def damage_values(data: bytes, chance: random.Random) -> bytes:
    """A model that is valid but for absurd numbers in a weight, a scale or a zero point."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(chance.choice([1, 2])):
        tensor = chance.choice(model.graph.initializer)
        array = onnx.numpy_helper.to_array(tensor).copy()
        if array.dtype.kind == "f" and array.size:
            array.reshape(-1)[chance.randrange(array.size)] = chance.choice(
                [np.nan, np.inf, -np.inf, 0, 3e38, 1e-45, -1e30]
            )
        elif array.dtype.kind in "iu" and array.size:
            information = np.iinfo(array.dtype)
            array.reshape(-1)[chance.randrange(array.size)] = chance.choice([information.min, information.max, 0])
        else:
            array = np.zeros((), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model.SerializeToString()


def cases(folder: Path, seed: int, start: int, count: int) -> Iterator[tuple[int, str, str, bytes]]:
    """Number, name of the damaged file, command, and its bytes; the same for the same seed."""
    for number in range(start, start + count):
        chance = random.Random(f"{seed} {number}")
        name = chance.choice(list(USES))
        data = (folder / name).read_bytes()
        ways: list[Callable[[bytes, random.Random], bytes]] = [damage_bytes]
        if name.endswith(".onnx"):
            ways += [damage_model] * 3 + [damage_values] * (name != "external.onnx")
        yield number, name, chance.choice(USES[name]), chance.choice(ways)(data, chance)


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
    """Run cases in children that may die; returns what went wrong."""
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
