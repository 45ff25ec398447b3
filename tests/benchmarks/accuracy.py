"""accuracy.py FLOAT TEST.npz QUANTIZED...: top-1, agreement with float and SQNR of each file; one JSON line.

`sqnr_db` and `top1` are of the optimised session, which is what is deployed; `sqnr_literal_db` runs the same file
with the optimiser off, which is what the Q/DQ pairs say. A gap between the two is a numerical trap of the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from session import load_inputs, open_session, run

LITERAL_SAMPLES = 32


def sqnr_db(reference: np.ndarray, values: np.ndarray) -> float:
    noise = max(float(((reference - values) ** 2).mean()), 1e-30)
    return round(float(10 * np.log10((reference**2).mean() / noise)), 2)


def size_bytes(path: Path) -> int:
    """The file and the external data it names."""
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    names = {ExternalDataInfo(tensor).location for tensor in initializers if uses_external_data(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def judge(path: Path, arrays: dict, labels: np.ndarray, reference: np.ndarray) -> dict:
    """The quality of one quantized file."""
    few = {name: array[:LITERAL_SAMPLES] for name, array in arrays.items()}
    outputs = run(open_session(path, threads=2), arrays)
    literal = run(open_session(path, threads=2, optimise=False), few)
    return {
        "top1": round(float((outputs.argmax(1) == labels).mean()), 5),
        "agreement": round(float((outputs.argmax(1) == reference.argmax(1)).mean()), 5),
        "sqnr_db": sqnr_db(reference, outputs),
        "sqnr_literal_db": sqnr_db(reference[:LITERAL_SAMPLES], literal),
        "bytes": size_bytes(path),
    }


def main() -> None:
    float_model, test, *quantized = (Path(argument) for argument in sys.argv[1:])
    arrays, labels = load_inputs(test)
    reference = run(open_session(float_model, threads=2), arrays)
    top1 = round(float((reference.argmax(1) == labels).mean()), 5)
    results: dict = {"float": {"top1": top1, "images": len(labels), "bytes": size_bytes(float_model)}}
    for path in quantized:
        try:
            results[str(path)] = judge(path, arrays, labels, reference)
        except Exception as error:  # noqa: BLE001  a peer's file that does not run is a result
            results[str(path)] = {"error": str(error)[:300]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
