"""What exporters leave beside a model: the configuration of its network, or of its pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "config.json"


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file that may be there; empty where it is not, or something else."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
