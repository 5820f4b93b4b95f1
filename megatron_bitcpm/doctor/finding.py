"""One result of one probe, and how the findings, probe name -> finding, are shown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

_wrap = partial(textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class Finding:
    """What a probe saw.

    Attributes:
        status: ``ok``; ``warn``, works, but not as well as it could; ``problem``, something does
            not work; ``absent``, optional and not here.
        value: a version, a path, a number: short.
        detail: why, or what follows from it.
        fix: what to do; given with every ``warn`` and ``problem``.
    """

    status: Literal["ok", "warn", "problem", "absent"]
    value: str
    detail: str = ""
    fix: str = ""


ok = partial(Finding, "ok")
warn = partial(Finding, "warn")
problem = partial(Finding, "problem")
absent = partial(Finding, "absent")


def exit_code(findings: Mapping[str, Finding]) -> int:
    """Return 1 if there is a problem, otherwise 0."""
    return int(any(finding.status == "problem" for finding in findings.values()))


def render_json(findings: Mapping[str, Finding]) -> str:
    """Return the findings as a JSON list."""
    entries = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
    return json.dumps(entries, indent=2)


def render_table(findings: Mapping[str, Finding]) -> str:
    """Return the findings as lines of text, fixes below what they belong to."""
    name_width = max(map(len, findings))
    indent = " " * (9 + name_width + 2)
    lines = []
    for name, finding in findings.items():
        text = finding.value + (f" - {finding.detail}" if finding.detail else "")
        head = f"{finding.status:<9}{name:<{name_width}}  "
        lines += _wrap(text, initial_indent=head, subsequent_indent=indent)
        if finding.fix:
            below = f"{indent}     "
            lines += _wrap(finding.fix, initial_indent=f"{indent}fix: ", subsequent_indent=below)
    statuses = [finding.status for finding in findings.values()]
    problems, warnings = statuses.count("problem"), statuses.count("warn")
    return "\n".join([*lines, "", f"{problems} problem(s), {warnings} warning(s)"])
