"""Export a torch module to ONNX with its BatchNorm nodes kept, for methods that work without data.

    python models/export.py package.module:factory --shape 1x3x224x224 -o model.onnx

``factory`` takes no arguments and returns the module with its weights loaded (a module object will do too).
A model with several inputs takes ``--shape`` once for each, in the order of ``forward``; integers are written
``--shape 1:int64``.

Why this file exists: both exporters of torch fold BatchNorm into the convolution before it, and with it goes
the only record of what the activations looked like, which synthesis needs. Two ways keep it:

* the dynamo exporter with ``optimize=False``, followed by constant folding only. That is what this file does,
  at opset 21, where GroupNormalization and Gelu stay single nodes. ``onnxscript.optimizer.optimize`` would
  fold BatchNorm again, so only its constant folding runs.
* the TorchScript exporter, where dynamo cannot trace the module::

      torch.onnx.export(module.eval(), inputs, "model.onnx", dynamo=False, opset_version=17,
                        do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE,
                        input_names=["x"], dynamic_axes={"x": {0: "batch"}})

The exporter also writes source paths and stack traces of this machine into every node. They are removed; the
module scopes, from which blocks are recovered, stay.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from onnxq.errors import OnnxqError
from onnxq.model import save

KEPT_METADATA = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
LARGEST_DIFFERENCE = 1e-3  # of the largest output: float32 sums in another order stay well below it
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "int32": torch.int32}


def export_keeping_batchnorm(
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int = 21,
) -> float:
    """Write ``module``, in evaluation mode, to one ONNX file and check the file against torch.

    Args:
        module: The module; its training mode is left as it was.
        example_inputs: The positional inputs of ``forward``, all with the same first dimension.
        path: Where the file goes; all weights are inside it.
        input_names: One name for each input (default: the parameter names of ``forward``).
        output_names: One name for each output.
        dynamic_batch: Whether the first dimension of every input becomes the symbol ``batch``.
        opset: ONNX opset.

    Returns:
        The largest difference between onnxruntime and torch, relative to the largest output.

    Raises:
        OnnxqError: the inputs' first dimensions differ, or onnxruntime disagrees with torch or cannot run the
            graph; nothing is written.
    """
    inputs = _two_in_a_batch(example_inputs) if dynamic_batch else tuple(example_inputs)
    batch = {0: torch.export.Dim("batch")}
    was_training = module.training
    module.eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=tuple(batch if tensor.ndim else None for tensor in inputs) if dynamic_batch else None,
                verbose=False,
            )
            model = program.model
            fold_constants(model)
        _clean(model)
        # One more in the batch than was traced, so that a batch size left in the graph as a constant shows.
        difference = largest_difference(model, module, _one_more(inputs) if dynamic_batch else inputs)
    finally:
        module.train(was_training)
    if not difference <= LARGEST_DIFFERENCE:  # also true of nan
        raise OnnxqError(
            f"expected onnxruntime to agree with torch, found a relative difference of {difference:.2g}",
            hint="nothing was written; a module with random or data-dependent behaviour cannot be exported as it is",
        )
    save(model, path, external_data=False)
    return difference


def largest_difference(model: ir.Model, module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The largest difference of any output between onnxruntime and torch, relative to the largest value."""
    serialized = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = module(*inputs)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    try:
        outputs = session.run(None, feeds)
    except Exception as error:
        raise OnnxqError(
            f"expected onnxruntime to run the export, found: {str(error).strip().splitlines()[0]}",
            hint="if the module needs one batch size, export with --fixed-batch (dynamic_batch=False)",
        ) from error
    worst = 0.0
    for reference, found in zip(expected, outputs, strict=True):
        if reference.shape != found.shape:
            return float("inf")
        scale = max(float(reference.abs().max()), 1e-6)
        worst = max(worst, float(np.abs(reference.numpy() - found).max()) / scale)
    return worst


def _two_in_a_batch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Examples with at least two in the batch: torch.export takes a dimension of 1 for a constant."""
    sizes = {tensor.shape[0] for tensor in inputs if tensor.ndim}
    if len(sizes) > 1:
        raise OnnxqError(
            f"expected inputs with one batch size, found {sorted(sizes)}",
            hint="give all inputs the same first dimension, or export with a fixed batch",
        )
    if sizes != {1}:
        return tuple(inputs)
    return tuple(torch.cat([tensor, tensor]) if tensor.ndim else tensor for tensor in inputs)


def _one_more(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same inputs with the first of the batch repeated at its end."""
    return tuple(torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor for tensor in inputs)


def _clean(model: ir.Model) -> None:
    """Lift constants, drop what nothing reads, and forget this machine: paths, stack traces, tracing notes."""
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in model.graph.all_nodes():
        # Unoptimised exports give a convolution without bias one of zeros.
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
        if bias is not None and bias.const_value is not None and not bias.const_value.numpy().any():
            node.resize_inputs(2)
    common_passes.RemoveUnusedNodesPass()(model)
    scopes = [
        {key: node.metadata_props[key] for key in KEPT_METADATA if key in node.metadata_props}
        for node in model.graph.all_nodes()
    ]
    common_passes.ClearMetadataAndDocStringPass()(model)
    for node, kept in zip(model.graph.all_nodes(), scopes, strict=True):
        node.metadata_props.update(kept)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own internals and on torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def load_module(name: str) -> nn.Module:
    """The module that ``package.module:factory`` names, looked for in the current folder as well."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise OnnxqError(f"expected package.module:factory, found {name!r}", hint="for example my_net:make_model")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise OnnxqError(
            f"expected a module {module_name} that imports, found: {error}",
            hint="run from the folder that holds it, or install it",
        ) from error
    except AttributeError as error:
        raise OnnxqError(f"expected {attribute} in {module_name}, found none", hint="check the spelling") from error
    module = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(module, nn.Module):
        raise OnnxqError(f"expected {name} to give a torch.nn.Module, found {type(module).__name__}")
    return module


def example_input(shape: str, generator: torch.Generator) -> Tensor:
    """A tensor for ``1x3x224x224`` (standard normal) or ``1:int64`` (zeros)."""
    sizes, _, dtype = shape.partition(":")
    dimensions = sizes.split("x")
    if dtype not in ("", *DTYPES) or not all(size.isdigit() and int(size) > 0 for size in dimensions):
        raise OnnxqError(
            f"expected a shape like 1x3x224x224 or 1:int64, found {shape!r}",
            hint=f"dimensions are positive, types are {', '.join(DTYPES)}",
        )
    tensor_type = DTYPES[dtype or "float32"]
    extents = [int(size) for size in dimensions]
    if tensor_type.is_floating_point:
        return torch.randn(extents, generator=generator).to(tensor_type)
    return torch.zeros(extents, dtype=tensor_type)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a torch module to ONNX with its BatchNorm nodes kept.")
    parser.add_argument("factory", help="package.module:factory, which returns a torch.nn.Module")
    parser.add_argument("--shape", action="append", required=True, help="1x3x224x224 or 1:int64; once per input")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument("--inputs", help="input names, separated by commas")
    parser.add_argument("--outputs", help="output names, separated by commas")
    parser.add_argument("--fixed-batch", action="store_true", help="keep the first dimension as given by --shape")
    parser.add_argument("--opset", type=int, default=21)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    try:
        inputs = [example_input(shape, generator) for shape in options.shape]
        difference = export_keeping_batchnorm(
            load_module(options.factory),
            inputs,
            options.output,
            input_names=options.inputs.split(",") if options.inputs else None,
            output_names=options.outputs.split(",") if options.outputs else None,
            dynamic_batch=not options.fixed_batch,
            opset=options.opset,
        )
    except OnnxqError as error:
        print(f"error: {error.message}", f"  tip: {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        print(f"error: torch could not export {options.factory}: {reason}", file=sys.stderr)
        print("  tip: try --fixed-batch, or the TorchScript way at the top of this file", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {options.output}; onnxruntime agrees with torch to {difference:.1e}")


if __name__ == "__main__":
    main()
