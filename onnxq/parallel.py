"""Work spread over processes or a Ray cluster, through one seam: :class:`concurrent.futures.Executor`.

Tasks are plain functions of what they are given, results come back in the order of the tasks, and what is done with
them never depends on how many workers there are: the same seed gives the same bytes on one core and on a cluster.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from onnxq import custom_ops, machine
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.serialized import Serialized, serialize

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # tasks in flight for each worker: one that runs, and one whose inputs are there already
CONNECT_SECONDS = 5.0
RETRIES = 3  # of a task whose node died


@dataclass(frozen=True)
class SharedModel:
    """A model that every worker holds one session of; sent once, not with every task.

    Attributes:
        key: What a worker keeps its session under.
        threads: Threads of the session inside an op.
        device: ``cpu`` or ``cuda``.
        optimize: As for the session.
        folder: Where the model lies, for workers on this machine.
        custom_ops: Libraries that its ops are from, under the same paths on every machine.
        reference: Ray's reference to it, for workers on any.
    """

    key: str
    threads: int
    device: str
    optimize: bool = True
    folder: str = ""
    custom_ops: list[str] = field(default_factory=custom_ops.list_libraries)
    reference: list[Any] = field(default_factory=list)  # inside a list Ray leaves it a reference

    def session(self) -> Session:
        """This process's session of the model."""
        if self.key not in _SESSIONS:
            custom_ops.use(self.custom_ops)
            _SESSIONS.clear()  # one model at a time: it is the largest thing that a worker holds
            _SESSIONS[self.key] = Session(
                self._model(), optimize=self.optimize, threads=self.threads, device=self.device
            )
        return _SESSIONS[self.key]

    def _model(self) -> Serialized:
        if self.reference:
            import ray

            model: Serialized = ray.get(self.reference[0])
            return model
        place = Path(self.folder)
        names = json.loads((place / "names.json").read_text())
        large = {name: np.load(place / f"{index}.npy", mmap_mode="r") for index, name in enumerate(names["large"])}
        proto = onnx.ModelProto.FromString((place / "model.onnx").read_bytes())
        return Serialized(
            proto, large, names["appended"], weight_bytes=names["weight_bytes"], condensed=names["condensed"]
        )


_SESSIONS: dict[str, Session] = {}


class Workers:
    """Processes on this machine, or the nodes of a Ray cluster.

    Args:
        executor: What runs the tasks.
        count: How many run at once.
        threads: Threads that each may use.
        ray: Ray's module, where it is the executor.
    """

    def __init__(self, executor: Executor, count: int, threads: int, ray: Any = None) -> None:
        self.executor, self.count, self.threads = executor, count, threads
        self._ray = ray
        self._failures: tuple[type[Exception], ...] = (BrokenExecutor, OSError)
        if ray is not None:
            self._failures += (ray.exceptions.RayError,)
        self._folders = contextlib.ExitStack()
        self._shared = itertools.count()

    def share(self, model: Serialized, device: str = "cpu", *, optimize: bool = True) -> SharedModel:
        """Make a model known to all workers."""
        key = f"{os.getpid()} {next(self._shared)}"
        if self._ray is not None:
            return SharedModel(key, self.threads, device, optimize, reference=[self._ray.put(model)])
        folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix="onnxq-shared-")))
        (folder / "model.onnx").write_bytes(model.model.SerializeToString())
        names = {
            "large": list(model.large), "appended": model.appended, "weight_bytes": model.weight_bytes,
            "condensed": model.condensed,
        }  # fmt: skip
        (folder / "names.json").write_text(json.dumps(names))
        for index, array in enumerate(model.large.values()):
            np.save(folder / f"{index}.npy", array)
        return SharedModel(key, self.threads, device, optimize, folder=str(folder))

    def share_file(self, path: Path, device: str = "cpu") -> SharedModel:
        """Make the model in a file known to all workers, as it is there."""
        from onnxq.model import read

        return self.share(serialize(read(path), by_path=False), device)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, which are drawn no further ahead than the workers need."""
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self.executor.submit(function, item))
                if len(waiting) >= AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except self._failures as error:
            cause = getattr(error, "cause", None)  # Ray wraps what a task raises
            if isinstance(cause, OnnxqError):
                raise cause from error
            reason = " ".join(str(error).split())[:200]
            raise OnnxqError(
                f"expected {self.count} workers to finish, found one that did not ({reason})",
                hint="run with fewer --workers, or look at the cluster's memory",
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Forget what was shared."""
        self._folders.close()


@contextlib.contextmanager
def open_workers(count: int = 1, ray_address: str | None = None) -> Iterator[Workers | None]:
    """Workers for the time of a ``with``; ``None`` where this process is to do everything itself.

    Args:
        count: Processes on this machine; with ``ray_address`` tasks at once, 1 for as many as the cluster has cores.
        ray_address: ``auto``, ``HOST:PORT``, or ``local`` for a cluster of this machine alone.

    Raises:
        OnnxqError: Ray is not installed, or there is no cluster at the address.
    """
    if ray_address is not None:
        with _ray_cluster(ray_address, count) as (ray, at_once):
            workers = Workers(_RayExecutor(ray), at_once, 1, ray)
            with contextlib.closing(workers):
                yield workers
    elif count > 1:
        threads = max(1, machine.cores() // count)
        # Never fork: onnxruntime's threads would not survive it.
        pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        with pool, contextlib.closing(Workers(pool, count, threads)) as workers:
            yield workers
    else:
        yield None


@contextlib.contextmanager
def _ray_cluster(address: str, count: int) -> Iterator[tuple[Any, int]]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise OnnxqError("expected Ray for --ray, found none", hint="pip install 'onnxq[ray]'") from error
    host, separator, port = address.rpartition(":")
    if separator and "://" not in address:
        _check_reachable(host, port)  # Ray itself waits for minutes
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {}
        if address == "local":
            options = {"num_cpus": count if count > 1 else None, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OnnxqError(
                f"expected a Ray cluster at {address}, found none ({reason})",
                hint="start one with `ray start --head`, or use --ray local",
            ) from error
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield ray, count if count > 1 else max(1, int(resources.get("CPU", 1)))
    finally:
        if mine:
            ray.shutdown()


def _check_reachable(host: str, port: str) -> None:
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise OnnxqError(
            f"expected a Ray cluster at {host}:{port}, found none ({error})",
            hint="start one with `ray start --head`, or use --ray local",
        ) from error


class _RayExecutor(Executor):
    """Ray behind the standard library's interface; tasks of a node that dies run again on another."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._remote: dict[Any, Any] = {}

    def submit(self, function: Callable[..., Result], /, *arguments: Any, **keywords: Any) -> Future[Result]:
        if function not in self._remote:
            self._remote[function] = self._ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        future: Future[Result] = self._remote[function].remote(*arguments, **keywords).future()
        return future
