"""latency.py FLOAT TEST.npz ROUNDS QUANTIZED...: milliseconds of one inference, one thread, batch 1; one JSON line.

All files are timed in turn, round after round, so that whatever else the machine does hits all of them alike. In each
round a file runs a short burst whose fastest run counts; over the rounds the median counts. `ratio` is the median over
the rounds of this file's time over the float model's time in the same round, and is the number to quote.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import onnx
from session import load_inputs, open_session

BURST_SECONDS = 0.05
BURST_RUNS = 4


def kernels(path: Path) -> dict[str, int]:
    """How often each operator occurs in the graph that onnxruntime really runs."""
    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def burst(session, feeds: dict) -> float:
    """The fastest of a few runs, after one that warms the caches."""
    session.run(None, feeds)
    best, end, runs = float("inf"), time.perf_counter() + BURST_SECONDS, 0
    while runs < BURST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best * 1000


def main() -> None:
    rounds, names = int(sys.argv[3]), [sys.argv[1], *sys.argv[4:]]
    feeds, _ = load_inputs(Path(sys.argv[2]), count=1)
    sessions, results, times = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            optimised = Path(folder) / f"{index}.onnx"
            try:
                sessions[name] = open_session(Path(name), 1, optimised_graph=optimised)
                sessions[name].run(None, feeds)
                results[name], times[name] = {"kernels": kernels(optimised)}, []
            except Exception as error:  # noqa: BLE001  a peer's file that does not run is a result
                sessions.pop(name, None)
                results[name] = {"error": str(error)[:300]}
    for _ in range(rounds):
        for name, session in sessions.items():
            times[name].append(burst(session, feeds))
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times[names[0]], strict=True)]
        results[name]["milliseconds"] = round(statistics.median(values), 4)
        results[name]["ratio"] = round(statistics.median(ratios), 3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
