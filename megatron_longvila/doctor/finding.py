"""One line of the doctor's report, and the report of many hosts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: `ok`; `note` for what may be as wanted; `PROBLEM` for what will fail or be slow.
        remedy: what to do; never empty for a problem.
        host: where.
    """

    name: str
    status: str
    value: str
    remedy: str = ""
    host: str = ""


def problem_if(bad: bool, name: str, value: str, remedy: str, status: str = PROBLEM) -> Finding:
    """A finding that is a problem (or `status`) if `bad`, and fine without a remedy otherwise."""
    return Finding(name, status, value, remedy) if bad else Finding(name, OK, value)


def render(findings: Sequence[Finding]) -> str:
    """Lines for people; hosts that agree share one."""
    hosts = sorted({finding.host for finding in findings})
    lines, seen = [], set()
    for finding in findings:
        key = (finding.name, finding.status, finding.value, finding.remedy)
        if key in seen:
            continue
        seen.add(key)
        those = sorted({one.host for one in findings if (one.name, one.status, one.value, one.remedy) == key})
        where = "" if those == hosts else f" [{shorten(those)}]"
        lines.append(f"{finding.status:8}{finding.name:14} {finding.value}{where}")
        if finding.remedy:
            lines += textwrap.wrap(finding.remedy, 132, initial_indent=" " * 23 + "-> ", subsequent_indent=" " * 26)
    problems = sum(line.startswith(PROBLEM) for line in lines)
    count = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''} ({shorten(hosts)})"
    lines.append(f"{count}: {problems or 'no'} problem{'s' if problems > 1 else ''}")
    return "\n".join(lines)


def shorten(hosts: Iterable[str], most: int = 4) -> str:
    """The first few hosts by name."""
    names = list(hosts)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
