"""Measure onnxq beside its peers on real classifiers: quality, latency, cost of quantizing, engines.

compare_with_peers.py --peers FOLDER --data FOLDER --out FILE.json [--models NAME...] [--tools PATTERN...]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import inputs
from process import child, last_json, measure
from results import Results
from tables import cost_table, model_table
from tools import Tool, installed

FAMILIES = ["quantize", "accuracy", "latency", "engine", "cost"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="where install_peers.sh put the environments")
    parser.add_argument("--data", type=Path, required=True, help="the folder with prepare.py and models/")
    parser.add_argument("--out", type=Path, required=True, help="results; what is there already is not measured again")
    parser.add_argument("--work", type=Path, help="quantized models, inputs and logs (default: beside the results)")
    parser.add_argument("--models", nargs="+", default=inputs.MODELS, choices=inputs.MODELS, metavar="NAME")
    parser.add_argument("--tools", nargs="+", default=["*"], metavar="PATTERN", help="such as 'onnxq:*' 'modelopt:max'")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--measure", default="quantize,accuracy,latency,engine", help=f"some of {','.join(FAMILIES)}")
    parser.add_argument("--cost-samples", default="16,64,256,1024", help="sample counts of the cost family")
    parser.add_argument("--rounds", type=int, default=25, help="rounds of the interleaved latency measurement")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a process is stopped")
    parser.add_argument("--limit-mib", type=float, default=12_000, help="memory above which a quantizer is stopped")
    parser.add_argument("--again", action="store_true", help="measure the selected tools again, also if results exist")
    options = parser.parse_args()
    options.measure = options.measure.split(",")
    if unknown := set(options.measure) - set(FAMILIES):
        parser.error(f"--measure knows {', '.join(FAMILIES)}, not {', '.join(sorted(unknown))}")
    options.work = options.work or options.out.with_suffix("")
    return options


def digest(out: Path) -> str:
    """Tells one output from another, external data included; empty if there is none."""
    files = sorted(out.parent.glob(f"{out.name}*")) if out.exists() else []
    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


class Comparison:
    """One run over some models and tools."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.results = Results(options.out)
        self.tools = installed(options.peers, options.tools)
        self.all_tools = installed(options.peers, ["*"])

    def log(self, *words: object) -> Path:
        return self.options.work / "logs" / ("_".join(str(word) for word in words).replace(":", ".") + ".log")

    def model(self, model: str) -> Path:
        return self.options.data / "models" / f"{model}.onnx"

    def test(self, model: str) -> Path:
        return inputs.prepare(self.options.data, self.options.work, model, "test")

    def files(self, model: str, tools: list[Tool]) -> dict[str, Tool]:
        """The quantized files that exist."""
        return {str(path): tool for tool in tools if (path := tool.output(self.options.work, model)).exists()}

    def missing(self, model: str, family: str) -> list[Tool]:
        """The selected tools without a result of this family."""
        return [tool for tool in self.tools if family not in self.results.tool(model, tool.name)]

    def quantize(self, model: str) -> None:
        """Quantize with every selected tool; a different file makes all that was measured on the old one void."""
        samples = self.options.samples
        calibration = inputs.prepare(self.options.data, self.options.work, model, "calib", samples)
        for tool in self.missing(model, "quantize"):
            out = tool.output(self.options.work, model)
            before = digest(out)
            cost = self.run_tool(tool, model, calibration, out, samples)
            entry = self.results.tool(model, tool.name)
            if digest(out) != before:
                entry.clear()
            entry["quantize"] = cost
            self.results.save()
            print(f"  {tool.name}: {cost.get('error', cost['wall_seconds'])}", file=sys.stderr, flush=True)

    def run_tool(self, tool: Tool, model: str, calibration: Path, out: Path, samples: int) -> dict:
        """The cost of one tool's process."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        log = self.log("quantize", model, tool.name, samples)
        cost = measure(
            tool.command(self.model(model), calibration, out, samples), log, self.options.limit, self.options.limit_mib
        )
        if "error" not in cost and not out.exists():
            cost["error"] = "no output file"
        if "error" in cost:
            out.unlink(missing_ok=True)
        cost["quantize_seconds"] = last_json(log).get("seconds")
        return cost

    def accuracy(self, model: str) -> None:
        """Top-1, agreement and SQNR of every file, all in one process."""
        files = self.files(model, self.missing(model, "accuracy"))
        if files:
            self.together("accuracy", model, files, self.model(model), self.test(model), *files)

    def latency(self, model: str) -> None:
        """All files there are, in turn: a new tool's latency is only comparable with the others' of the same run."""
        if self.files(model, self.missing(model, "latency")):
            files = self.files(model, self.all_tools)
            self.together("latency", model, files, self.model(model), self.test(model), self.options.rounds, *files)

    def together(self, family: str, model: str, files: dict[str, Tool], *words: object) -> None:
        """Run one measuring process for many files and spread its answer over the tools."""
        answer = child(f"{family}.py", self.log(family, model), 4 * self.options.limit, *words)
        if "error" in answer:
            print(f"  {family}: {answer['error']}", file=sys.stderr)
            return
        reference = self.results.model(model)["float"]
        if family == "latency":
            reference["latency"] = answer[str(self.model(model))]
        else:
            reference |= answer["float"]
        for name, tool in files.items():
            self.results.tool(model, tool.name)[family] = answer[name]
        self.results.save()

    def engine(self, model: str) -> None:
        """Does the compiler take it? A process for each file: a crash of the compiler is an answer."""
        for name, tool in self.files(model, self.missing(model, "engine")).items():
            answer = child("engine.py", self.log("engine", model, tool.name), self.options.limit, name)
            result = {"accepted": False, "reason": answer["error"]} if "error" in answer else answer
            self.results.tool(model, tool.name)["engine"] = result
            self.results.save()

    def cost(self, model: str) -> None:
        """Wall time and peak memory over the number of samples, beside the bare float inference of the same samples."""
        for samples in (int(count) for count in self.options.cost_samples.split(",")):
            entries = self.results.cost(model, samples)
            calibration = inputs.prepare(self.options.data, self.options.work, model, "calib", samples)
            repeated = calibration.with_suffix(f".repeated{samples}.npz")
            child("inputs.py", self.log("repeat", model, samples), self.options.limit, calibration, samples)
            out = self.options.work / "cost" / f"{model}.onnx"
            out.parent.mkdir(parents=True, exist_ok=True)
            script = Path(__file__).resolve().parent / "float_inference.py"
            command = [str(part) for part in (sys.executable, script, self.model(model), repeated, out)]
            for tool in self.tools:
                if tool.name not in entries or self.options.again:
                    # beside each tool, so that both meet the same load
                    bare = measure(command, self.log("float", model, samples), self.options.limit)
                    entry = self.run_tool(tool, model, repeated, out, samples)
                    entries[tool.name] = entry | {"ratio": round(entry["wall_seconds"] / bare["wall_seconds"], 2)}
                    entries["float inference"] = bare | {"ratio": 1.0}
                    self.results.save()
            repeated.unlink(missing_ok=True)
        print(cost_table(model, self.results.content["cost"][model]), flush=True)

    def run(self) -> None:
        """Model by model, so that the first table is there early."""
        print(", ".join(tool.name for tool in self.tools), file=sys.stderr)
        for model in self.options.models:
            print(model, file=sys.stderr, flush=True)
            families = [family for family in FAMILIES if family in self.options.measure and family != "cost"]
            if self.options.again:
                for tool in self.tools:
                    for family in families:
                        self.results.tool(model, tool.name).pop(family, None)
            for family in families:
                getattr(self, family)(model)
            if families:
                print(model_table(model, self.results.model(model)), flush=True)
            if "cost" in self.options.measure:
                self.cost(model)


if __name__ == "__main__":
    Comparison(arguments()).run()
