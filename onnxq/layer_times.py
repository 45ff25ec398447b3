"""How long each layer of a model takes in onnxruntime on this machine, from the profile of its kernels."""

from __future__ import annotations

import collections
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxq import layer_nodes
from onnxq.runtime import Feed, Session

KERNEL = "_kernel_time"
ADDED = re.compile(r"(_token_\d+|_nchwc)+$")  # what onnxruntime's optimiser puts behind the name of what it fused
MINIMUM_RUNS = 5


def owners_of(graph: ir.Graph) -> dict[str, str]:
    """The layer that each node, and each value, belongs to: itself, or the last layer before it; ``""`` before any."""
    layers = {item.node for item in layer_nodes.weighted_nodes(graph)}
    owners: dict[str, str] = {}
    order: dict[str, int] = {"": -1}
    for node in graph:
        if node in layers:
            owner = node.name or ""
            order[owner] = len(order)
        else:
            before = [owners.get(value.name or "", "") for value in node.inputs if value is not None]
            owner = max(before, key=lambda name: order[name], default="")
        owners |= {name: owner for name in (node.name, *(value.name for value in node.outputs)) if name}
    return owners


def layer_times_ms(
    session_of: ir.Model, feed: Feed, owners: Mapping[str, str], *, seconds: float = 0.5, threads: int = 1
) -> dict[str, float]:
    """Milliseconds that the kernels of each layer take, with all that follows until the next one.

    onnxruntime fuses nodes and names the result after one of them, or after what it writes; conversions and changes of
    layout have names of its own. A kernel of an unknown name goes to the layer that ran before it.

    Args:
        session_of: The model.
        feed: One input for it.
        owners: The layer of each name in the graph (see :func:`owners_of`).
        seconds: How long to run it.
        threads: Threads inside an op.

    Returns:
        By name of the layer; under ``""`` what runs before the first. The mean of the faster half of the runs.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        session = Session(session_of, threads=threads, spin=True, profile_prefix=str(Path(folder) / "profile"))
        runs, start = 0, time.perf_counter()
        while runs <= MINIMUM_RUNS or time.perf_counter() - start < seconds:
            session.run(feed)
            runs += 1
        events = session.profile()
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]
    length = len(kernels) // runs
    found: dict[str, float] = collections.defaultdict(float)
    owner = ""
    for index in range(length):
        name = kernels[index]["name"].removesuffix(KERNEL)
        owner = owners.get(name, owners.get(ADDED.sub("", name), owner))
        durations = np.sort([kernels[index + length * run]["dur"] for run in range(1, runs)])  # the first run warms up
        found[owner] += float(durations[: (len(durations) + 1) // 2].mean()) / 1000
    return dict(found)
