"""What ``hf_packfix.status()`` returns."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_packfix.engine.patch import PatchStatus


@dataclass(frozen=True, repr=False)
class Status:
    """Where hf_packfix stands in this process; ``print`` it, or let a notebook show it as a table.

    Attributes:
        enabled: whether the patches act, or will as soon as what they patch is imported.
        reason: why it is enabled or not.
        activated_by: what turned it on, such as ``import hf_packfix``; None while it is off.
        versions: the installed version of each distribution that matters; None if it is missing.
        patches: every patch with its target, its problem and fix, and its state.
    """

    enabled: bool
    reason: str
    activated_by: str | None
    versions: dict[str, str | None] = field(default_factory=dict)
    patches: tuple[PatchStatus, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self._head(), self._installed(), *map(str, self.patches)])

    def __repr__(self) -> str:
        return f"<Status: {self._head()}; {self._counts()}>"

    def summary(self) -> list[str]:
        """Return three lines: why it is on or off, the versions, and how many patches are in each state."""
        return [self._head(), self._installed(), self._counts()]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(patch.state)}</td><td><code>{html.escape(patch.target)}</code></td>"
            f"<td>{html.escape(patch.detail)}</td><td>{html.escape(patch.problem)}</td>"
            f"<td>{html.escape(patch.fix)}</td></tr>"
            for patch in self.patches
        )
        return (
            f"<p><b>{html.escape(self._head())}</b><br>{html.escape(self._installed())}</p>"
            f"<table><thead><tr><th>state</th><th>patched, in place</th><th>detail</th><th>the original</th>"
            f"<th>with the patch</th></tr></thead><tbody>{rows}</tbody></table>"
        )

    def _counts(self) -> str:
        counts = Counter(patch.state for patch in self.patches)
        return f"patches: {', '.join(f'{count} {state}' for state, count in counts.items()) or 'none'}"

    def _head(self) -> str:
        return f"hf_packfix is {'enabled' if self.enabled else 'not enabled'}: {self.reason}"

    def _installed(self) -> str:
        return ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items())
