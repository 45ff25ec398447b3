"""What a lint finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: The rule's short name, such as ``E5``.
        severity: ``error`` (refused, or silently wrong or float) or ``warning`` (slower or less exact).
        node: The node it was found at.
        message: What was expected and what was found.
    """

    rule: str
    severity: str
    node: str
    message: str

    def to_json(self) -> dict[str, str]:
        """The keys ``rule``, ``node`` and ``message``."""
        entries = asdict(self)
        del entries["severity"]
        return entries
