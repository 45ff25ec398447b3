"""Pipelines of diffusers beside our sampler: what the network is told in each step, and where the samples arrive.

    pip install diffusers transformers
    python tests/benchmarks/pipelines.py --out pipelines

Networks are small and random, schedules are those that the models are published with. A pipeline runs from given noise;
its network is exported, laid down with `config.json` and `scheduler/scheduler_config.json` as exporters do, found again
by path alone, and sampled from the same noise in onnxruntime. The last column is the SQNR between both results. In the
place of networks that torch cannot export stands what predicts waves of its time (`stand_in`), as fast as theirs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from pipeline_descriptions import PIPELINES

STEPS = 6


def measure(name: str, folder: Path) -> str:
    """What the network was told by both, and how far the results are apart."""
    import diffusers
    import torch

    from onnxq import model as models
    from onnxq.config import make_settings
    from onnxq.diffusion.source import open_sampler
    from onnxq.runtime import Session

    torch.manual_seed(0)
    described = PIPELINES[name]
    kind, config = described["network"]
    network = getattr(diffusers, kind)(**config).eval()
    for parameter in network.parameters():
        # Ends that start as zero make predictions of nothing; what is never set, of anything.
        if parameter.numel() and not (parameter.any() and parameter.isfinite().all()):
            torch.nn.init.normal_(parameter, std=0.02)
    scheduler = getattr(diffusers, described["schedule"][0]).from_config(described["schedule"][1])
    takes = inspect.signature(getattr(diffusers, described["pipeline"]).__init__).parameters
    parts = dict.fromkeys(("vae", "text_encoder", *described["parts"]))
    parts |= described.get("made", {})
    parts |= {"transformer" if "transformer" in takes else "unet": network, "scheduler": scheduler}
    pipeline = getattr(diffusers, described["pipeline"])(**{key: parts[key] for key in parts if key in takes})
    pipeline.set_progress_bar_config(disable=True)
    call = {key: given(item) for key, item in described["call"].items()}
    call |= {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    seen: list[dict[str, Any]] = []
    names = list(inspect.signature(network.forward).parameters)
    if "stand_in" in described:
        network.forward = stand_in(names, **described["stand_in"])

    def note(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = dict(zip(names, positional, strict=False)) | named
        values |= {key: torch.stack(item) for key, item in values.items() if is_one_by_one(item)}
        seen.append({key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in values.items()})

    network.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        pipeline(**call)
    told_name = name_of_time(seen[0])
    # Masks are as good as constant, and some networks ask for their sums.
    inputs = {
        key: item for key, item in seen[0].items()
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or key == told_name)
    }  # fmt: skip
    fixed = {key: item for key, item in seen[0].items() if key not in inputs and key != "return_dict"}
    sample = next(iter(inputs))
    place = folder / name.replace(" ", "_").replace("'", "")
    path = place / "network" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    export(network, inputs, fixed, path)
    (path.parent / "config.json").write_text(json.dumps({"_class_name": kind}))
    scheduler.save_pretrained(place / "scheduler")
    by_itself = (sample, told_name, "guidance", "img_ids", "txt_ids")
    conditions = {key: value.numpy() for key, value in inputs.items() if key not in by_itself}
    with torch.no_grad():
        predicted = first_of(network(**inputs, **fixed, return_dict=False)).shape
    for axis, size in enumerate(predicted):
        if (beside := inputs[sample].shape[axis] - size) > 0:  # what stands behind the noise
            conditions[f"{sample}.behind"] = inputs[sample].narrow(axis, size, beside).numpy()
    np.savez(place / "conditions.npz", **conditions)
    settings = make_settings({"steps": STEPS, "conditions": str(place / "conditions.npz")})
    sampler, line = open_sampler(models.load(path), path, settings)
    assert str(place) in line, line
    run = sampler.run(Session(path), [0])
    generator = np.random.default_rng([0, 0])
    noise = torch.from_numpy(generator.standard_normal(sampler.denoiser.noise_shape, np.float32))
    if "grid" in described:
        noise = noise.T.reshape(-1, *described["grid"])
    noise = noise.reshape(described.get("latents", noise.shape))
    if "generator" in inspect.signature(pipeline.__call__).parameters:  # as our sampler makes one for each sample
        call["generator"] = [torch.Generator().manual_seed(int(generator.integers(1 << 62)))]
    seen.clear()
    with torch.no_grad():
        wanted = pipeline(**call, latents=noise[None])[0].numpy()
    told = [float(item[told_name].reshape(-1)[0]) for item in seen]
    ours = [float(visit.feed[sampler.denoiser.timestep.name].reshape(-1)[0]) for visit in run]
    apart = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(told, ours, strict=True))
    found = run.sample.reshape(-1)
    wanted = wanted.reshape(-1)
    ratio = 10 * np.log10(np.mean(wanted**2) / max(np.mean((wanted - found) ** 2), 1e-30))
    shown = ", ".join(f"{time:.4g}" for time in told)
    return f"told {shown}; ours apart by {apart:.1e} at most; result {ratio:.1f} dB"


def given(described: Any) -> Any:
    """An argument of a pipeline: random where a shape is described, also in a list."""
    import torch

    if isinstance(described, list):
        return [given(item) for item in described]
    if isinstance(described, tuple):
        return torch.randn(described)
    return torch.from_numpy(described) if isinstance(described, np.ndarray) else described


def is_one_by_one(value: Any) -> bool:
    """Whether a network is given tensors of samples in a list."""
    import torch

    if not isinstance(value, list) or not all(isinstance(item, torch.Tensor) for item in value):
        return False
    return len({item.shape for item in value}) == 1


def name_of_time(values: dict[str, Any]) -> str:
    """Under which name a network is told the time."""
    return next(key for key in values if key.startswith("timestep") or key == "t")


def first_of(predicted: Any) -> Any:
    """The prediction, which some networks return alone."""
    return predicted[0] if isinstance(predicted, tuple) else predicted


def stand_in(names: list[str], rate: float = 1.0, copies: int = 1, channels: int | None = None) -> Any:
    """The `forward` of a network whose prediction is its sample, bent, and waves of its time.

    Args:
        names: Of the network's arguments, the sample first.
        rate: Of the fastest wave.
        copies: How many times as many channels as the sample the prediction has.
        channels: How many of the sample's channels are noise; ``None``: all.
    """
    import torch

    rates = rate * 1e4 ** -torch.linspace(0, 1, 8)

    def forward(*positional: Any, **named: Any) -> tuple[Any]:
        values = dict(zip(names, positional, strict=False)) | named
        sample, time = next(iter(values.values())), values[name_of_time(values)]
        if one_by_one := is_one_by_one(sample):
            sample = torch.stack(sample)
        waves = torch.cos(time.float().reshape(-1, 1) * rates).mean(1).reshape(-1, *[1] * (sample.ndim - 1))
        prediction = torch.cat([torch.tanh(sample[:, :channels]) / 2 + waves] * copies, 1)
        return (list(prediction) if one_by_one else prediction,)

    return forward


def export(network: Any, inputs: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    """Write the network with the inputs that a pipeline gives it; what is fixed becomes part of the graph."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *values: Any) -> Any:
            return first_of(self.network(**dict(zip(inputs, values, strict=True)), **fixed, return_dict=False))

    torch.onnx.export(
        Called().eval(), tuple(inputs.values()), path, dynamo=True, input_names=list(inputs), opset_version=21,
        external_data=False, verbose=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipelines"))
    parser.add_argument("--names", nargs="*", default=list(PIPELINES), choices=list(PIPELINES), metavar="NAME")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in arguments.names:
        try:
            print(f"{name:26} {measure(name, arguments.out)}", flush=True)
        except Exception as error:  # noqa: BLE001 - one that fails is a row, not the end
            print(f"{name:26} {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
