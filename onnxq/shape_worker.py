"""onnx's shape inference alone in a process that may fail: ``shape_worker.py EXTENSION SECONDS BYTES < model``.

Run as a script, on nothing but the standard library and the compiled part of onnx: it is back in 30 milliseconds.
"""

import contextlib
import sys
from importlib import util
from importlib.machinery import ExtensionFileLoader


def main(extension: str, seconds: int, size: int) -> None:
    """Read a model from standard input and write it with all shapes to standard output."""
    with contextlib.suppress(ModuleNotFoundError):  # Windows, where only the parent's patience limits it
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # it ends even if its parent was killed
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    loader = ExtensionFileLoader("onnx_cpp2py_export", extension)
    spec = util.spec_from_loader(loader.name, loader)
    assert spec is not None
    compiled = util.module_from_spec(spec)
    loader.exec_module(compiled)
    inferred = compiled.shape_inference.infer_shapes(sys.stdin.buffer.read(), True, True, True)
    sys.stdout.buffer.write(inferred)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
