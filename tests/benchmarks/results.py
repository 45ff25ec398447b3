"""The results file: JSON that is complete after every step, so that an interrupted comparison goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Results:
    """models → model → float | tools → tool → family of measurements, and cost → model → samples → tool."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict = json.loads(path.read_text()) if path.exists() else {"models": {}, "cost": {}}

    def model(self, model: str) -> dict:
        return self.content["models"].setdefault(model, {"float": {}, "tools": {}})

    def tool(self, model: str, tool: str) -> dict:
        return self.model(model)["tools"].setdefault(tool, {})

    def cost(self, model: str, samples: int) -> dict:
        return self.content["cost"].setdefault(model, {}).setdefault(str(samples), {})

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)
