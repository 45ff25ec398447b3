"""One graph for each group of sampler steps: the weights stored once, and an index that says which serves what."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxq import model as models
from onnxq import plugins
from onnxq.writing import atomic_folder

INDEX_ENDING = ".groups.json"
SMALLEST_SHARED_BYTES = 256  # onnx-ir leaves smaller tensors in the graph's own file
INLINE_BYTES = 1 << 20  # of weights in a subgraph's own file: who opens an index reads that file of every subgraph


@dataclass(frozen=True)
class Subgraph:
    """The denoiser for some steps.

    Attributes:
        model: With the scales of those steps.
        steps: Their numbers, 0 being the noisiest.
        timesteps: What the network is told in them.
    """

    model: ir.Model
    steps: tuple[int, ...]
    timesteps: tuple[float, ...]


def index_path(path: str | os.PathLike[str]) -> Path:
    """Where the index of a model's subgraphs is."""
    file = Path(path)
    return file.with_name(f"{file.stem}{INDEX_ENDING}")


def is_index(path: object) -> bool:
    """Whether a path is that of an index of subgraphs rather than of a model."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(INDEX_ENDING)


def save(model: ir.Model, subgraphs: Sequence[Subgraph], path: str | os.PathLike[str]) -> Path:
    """Write a model and its subgraphs beside each other, whole or not at all.

    ``NAME.onnx`` is the model for all steps; ``NAME.onnx.data`` the weights of all; ``NAME.group0.onnx`` and so on the
    subgraphs, with many weights of their own in ``NAME.group0.onnx.data``; ``NAME.groups.json`` the index. The index
    is written last: while it is missing, nothing is.

    Args:
        model: The graph for all steps, whose weights the subgraphs share.
        subgraphs: In the order of steps.
        path: Where the model goes.

    Returns:
        The path of the model.

    Raises:
        OnnxqError: the folder does not exist or cannot be written.
    """
    file = Path(path)
    index = index_path(file)
    if not subgraphs:
        return models.save(model, file)
    entries = []
    with atomic_folder(file) as folder:
        models.save(model, folder / file.name, external_data=True)
        stored = ir.load(folder / file.name)
        written = [file.name, f"{file.name}.data"]
        for number, subgraph in enumerate(subgraphs):
            name = f"{file.stem}.group{number}.onnx"
            part = subgraph.model.clone()
            plugins.put_back(part)
            part.metadata_props.update({f"onnxq.{key}": text for key, text in models.get_metadata(model).items()})
            own: list[ir.Value] = []
            for key, value in part.graph.initializers.items():
                own.append(value)
                shared = stored.graph.initializers.get(key)
                original = model.graph.initializers.get(key)
                if shared is None or original is None or not isinstance(shared.const_value, ir.ExternalTensor):
                    continue
                if value.const_value is original.const_value:
                    value.const_value = shared.const_value
                    own.pop()
            if _move_out(own, folder, f"{name}.data"):
                written.append(f"{name}.data")
            ir.save(part, folder / name)
            written.append(name)
            entries.append({"file": name, "steps": list(subgraph.steps), "timesteps": list(subgraph.timesteps)})
        text = json.dumps({"weights": f"{file.name}.data", "groups": entries}, indent=1)
        (folder / index.name).write_text(text + "\n", encoding="utf-8")
        index.unlink(missing_ok=True)
        for name in [*reversed(written), index.name]:
            os.replace(folder / name, file.parent / name)
    return file


def _move_out(values: Sequence[ir.Value], folder: Path, name: str) -> bool:
    """Write weights that a graph has for itself into a file, where they are too many for its own or lie in another."""
    pairs = [(value, value.const_value) for value in values if value.const_value is not None]
    elsewhere = any(isinstance(tensor, ir.ExternalTensor) for _, tensor in pairs)
    if not elsewhere and sum(tensor.nbytes for _, tensor in pairs) <= INLINE_BYTES:
        return False
    large = [(value, tensor) for value, tensor in pairs if tensor.nbytes >= SMALLEST_SHARED_BYTES]
    moved = ir.external_data.convert_tensors_to_external([tensor for _, tensor in large], folder, name)
    for (value, _), tensor in zip(large, moved, strict=True):
        value.const_value = tensor
    return True
