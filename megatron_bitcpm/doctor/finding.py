"""One result of one probe, and how a list of them is shown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "problem", "absent"]
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """What a probe saw.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``, works, but not as well as it could; ``problem``, something does
            not work; ``absent``, optional and not here.
        value: a version, a path, a number: short.
        detail: why, or what follows from it.
        fix: what to do; given with every ``warn`` and ``problem``.
    """

    name: str
    status: Status
    value: str
    detail: str = ""
    fix: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if there is a problem, otherwise 0."""
    return int(any(finding.status == "problem" for finding in findings))


def render_json(findings: Iterable[Finding]) -> str:
    """Return the findings as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def render_table(findings: list[Finding]) -> str:
    """Return the findings as lines of text, fixes below what they belong to."""
    name_width = max(len(finding.name) for finding in findings)
    indent = " " * (9 + name_width + 2)
    lines = []
    for finding in findings:
        text = finding.value + (f" - {finding.detail}" if finding.detail else "")
        head = f"{finding.status:<9}{finding.name:<{name_width}}  "
        lines += _wrap(text, head, indent)
        if finding.fix:
            lines += _wrap(finding.fix, f"{indent}fix: ", f"{indent}     ")
    counts = {s: sum(f.status == s for f in findings) for s in ("problem", "warn")}
    lines += ["", f"{counts['problem']} problem(s), {counts['warn']} warning(s)"]
    return "\n".join(lines)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
