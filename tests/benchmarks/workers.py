"""How calibration speeds up with workers of one core each, after they have started.

    python tests/benchmarks/workers.py MODEL --data calibration.npz [--workers 1 2] [--ray]

The time is that of recording alone, once every worker holds its session; ranges must be the same for every count.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from onnxq import model as models
from onnxq import targets
from onnxq.calibration.data import input_specs, open_source
from onnxq.calibration.recording import record
from onnxq.parallel import Workers, open_workers
from onnxq.runtime import Session
from onnxq.scheme import Scheme
from onnxq.serialized import serialize


@contextlib.contextmanager
def opened(count: int, ray: bool) -> Iterator[Workers]:
    """Workers of one core each, also where there is only one."""
    if ray and count > 1:
        with open_workers(count, "local") as workers:
            assert workers is not None
            yield workers
        return
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    with pool, contextlib.closing(Workers(pool, count, 1)) as workers:
        yield workers


def main() -> None:
    """Print seconds and the ratio to the first count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=4, help="go through the data so many times")
    parser.add_argument("--ray", action="store_true", help="a local Ray cluster for more than one")
    arguments = parser.parse_args()
    target = targets.get("tensorrt")
    model = models.load(arguments.model)
    target.prepare(model)
    scheme: Scheme = target.scheme(None, None)
    sites = target.place(model.graph, scheme).sites
    specs = input_specs(model)
    inputs = {spec.name for spec in specs}
    taps = sorted({(site.like or site.value).name or "" for site in sites if not site.value.is_initializer()})
    serialized = serialize(model, [name for name in taps if name not in inputs])
    rows = list(open_source(arguments.data, specs))
    source = [
        {spec.name: row[spec.name][None] for spec in specs}
        for row in itertools.chain.from_iterable([rows] * arguments.repeat)
    ]
    first, expected = 0.0, None
    for count in arguments.workers:
        with opened(count, arguments.ray) as workers:
            shared = workers.share(serialized)
            opening = open_source(source[: 64 * 4 * count], specs)
            record(Session(serialized, threads=1), taps, opening, specs, workers=workers, shared=shared)
            session, before = Session(serialized, threads=1), time.perf_counter()
            found = record(session, taps, open_source(source, specs), specs, workers=workers, shared=shared)
            seconds = time.perf_counter() - before
        ranges = {name: (item.low, item.high, item.sum_of_highs) for name, item in found.statistics.items()}
        first, expected = first or seconds, expected or ranges
        assert ranges == expected, "the ranges differ"
        print(f"{count} workers: {seconds:.1f} s for {found.samples} samples, {first / seconds:.2f}x")


if __name__ == "__main__":
    main()
