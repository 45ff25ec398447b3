"""Ways to damage a valid file at random: in its bytes, or in what it says while it stays well-formed."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import yaml

INTERESTING = (0, 1, -1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
ABSURD: tuple[Any, ...] = (
    None, True, "", "x" * 3000, "../../outside", "/etc/passwd", "nan", [], [[]], {}, {"a": {"b": []}}, 0, -1, 0.5,
    1e308, float("nan"), float("inf"), 2**63, -(2**70), "\N{SNOWMAN}", "\0", [0] * 1000,
)  # fmt: skip
YAML_TRICKS = (
    "!!python/object/apply:os.system ['touch out.onnx']\n", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "? [1, 2]\n: 3\n", "recipe: int8\nrecipe: fp8\n", "--- 1\n--- 2\n", "- int8\n", "knobs: {<<: {observer: mse}}\n",
    "seed: 0o17\n", "samples: 1_000\n", "target: no\n",
    "x: " + "[" * 900 + "]" * 900 + "\n", "%YAML 9.9\n---\nseed: 1\n",
)  # fmt: skip


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


def damage_metadata(data: bytes, chance: random.Random) -> bytes:
    """A model that remembers something else: texts and tables that onnxq or an exporter wrote into it."""
    model = onnx.ModelProto.FromString(data)
    entries = [*model.metadata_props, *(entry for node in model.graph.node for entry in node.metadata_props)]
    for entry in chance.sample(entries, min(len(entries), chance.choice([1, 1, 2, 5]))):
        try:
            entry.value = damage_json(entry.value.encode(), chance).decode()
        except ValueError:  # a word
            entry.value = chance.choice([entry.value[1:], *map(str, ABSURD), "[" * 5000, '{"a": 1}', "[1, 2"])
    return model.SerializeToString()


def damage_json(data: bytes, chance: random.Random) -> bytes:
    """Valid JSON that says something else: values of other types and sizes, keys gone, doubled or unknown."""
    document = json.loads(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        document = _damage_document(document, chance)
    return json.dumps(document).encode()


def damage_yaml(data: bytes, chance: random.Random) -> bytes:
    """The same of YAML, and what YAML alone has: tags, aliases, several documents, keys that are no words."""
    if chance.random() < 0.3:
        return chance.choice([b"", data]) + chance.choice(YAML_TRICKS).encode()
    document = yaml.safe_load(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        document = _damage_document(document, chance)
    return yaml.safe_dump(document).encode()


def _damage_document(document: Any, chance: random.Random) -> Any:
    """One change somewhere in nested lists and dictionaries."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in pairs:
            places.append((node, key))
            walk(inner)

    walk(document)
    if not places or chance.random() < 0.03:
        return chance.choice(ABSURD)
    holder, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["unknown", "", key + key if isinstance(key, str) else "0"])] = holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif kind == 3:
        other, place = chance.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 4 and isinstance(holder[key], (int, float)):
        holder[key] = chance.choice([holder[key] * 10**6, -holder[key], holder[key] + 0.5, *INTERESTING])
    else:
        holder[key] = chance.choice(ABSURD)
    return document


def damage_arrays(data: bytes, chance: random.Random) -> bytes:
    """A well-formed ``.npz`` whose arrays are others than expected, or whose headers lie."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    for _ in range(chance.choice([1, 1, 2])):
        name, array = chance.choice(list(arrays.items()))
        member = f"{name}.npy"
        kind = chance.randrange(9)
        if kind == 0:
            dtypes = ["f2", "f8", "i1", "i8", "u2", "?", "c8", "U3", "S2", "M8[s]", ">f4", "V3", [("a", "f4")]]
            members[member] = _npy(np.zeros(array.shape, chance.choice(dtypes)))
        elif kind == 1:
            shapes = [(), (0,), (*array.shape, 1), array.shape[1:], array.shape[::-1], (0, *array.shape[1:]), (1,) * 32]
            members[member] = _npy(np.zeros(chance.choice(shapes), array.dtype))
        elif kind == 2 and array.dtype.kind == "f" and array.size:
            changed = array.copy()
            changed.reshape(-1)[chance.randrange(array.size)] = chance.choice([np.nan, np.inf, -np.inf, 3e38, -1e-45])
            members[member] = _npy(changed)
        elif kind == 3:  # what only unpickling could read
            members[member] = _npy(np.array([{"a": 1}, None], object))
        elif kind == 4:
            size = chance.choice([2**31, 2**40, 2**62, 10**30, -1])
            members[member] = _header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size}, 3, 8, 8), }}")
        elif kind == 5:
            texts = ["", "{", "{'descr': 1}", "__import__('os').getpid()", "{'descr': '<f4', 'shape': 3}", "[" * 5000]
            members[member] = _header(chance.choice(texts))
        elif kind == 6:
            members[chance.choice(["../x.npy", "/x.npy", "x", ".npy", "sub/x.npy", "labels.npy"])] = _npy(array)
        elif kind == 7:
            members.pop(member, None)
        else:
            members[member] = _npy(np.asfortranarray(array))
        if not members:
            break
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(text: str) -> bytes:
    """An array file with this header and a little data."""
    encoded = text.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(encoded).to_bytes(4, "little") + encoded + bytes(768)


def ways(name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    """How a file of this name can be damaged; what comes more than once is done more often."""
    if name.endswith(".onnx"):
        remembers = name in ("corrected.onnx", "master.onnx", "quantized.onnx")
        values = name != "external.onnx"
        return [damage_bytes, *[damage_model] * 3, *[damage_values] * values, *[damage_metadata] * 2 * remembers]
    structured = {".json": damage_json, ".yaml": damage_yaml, ".npz": damage_arrays}
    return [damage_bytes] + [way for end, way in structured.items() if name.endswith(end)] * 3
