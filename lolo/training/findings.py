"""What `lolo doctor` says of a run: findings with verdicts, and what they come to."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple


class Verdict(enum.Enum):
    """Of one check, or of a run."""

    OK = "ok"
    FAIL = "fail"
    SHORT = "too short to say"
    LEFT_OUT = "not measured"


class Finding(NamedTuple):
    """One thing looked at."""

    verdict: Verdict
    what: str  # what was found, with its numbers
    advice: tuple[str, ...] = ()  # what to do about it, most promising first
    decides: bool = False  # whether the run can't be called healthy unless this is ok


WIDTH = max(len(verdict.value) for verdict in Verdict) + 2


def above(low: float, high: float, least: float) -> Verdict:
    """Whether a number whose 95 % interval reaches from `low` to `high` is more than `least`."""
    if math.isnan(low) or math.isnan(high):
        return Verdict.SHORT
    if low > least:
        return Verdict.OK
    return Verdict.FAIL if high <= least else Verdict.SHORT


def overall(findings: Sequence[Finding]) -> Verdict:
    """FAIL if any check failed; OK if all that decide are; else it can't be said, and LEFT_OUT before SHORT."""
    verdicts = [finding.verdict for finding in findings]
    deciding = [finding.verdict for finding in findings if finding.decides]
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    if deciding and all(verdict is Verdict.OK for verdict in deciding):
        return Verdict.OK
    return Verdict.LEFT_OUT if Verdict.LEFT_OUT in deciding else Verdict.SHORT


CONCLUSIONS = {
    Verdict.OK: "healthy: φ is better than at its start, it stands up to its expert, and nothing else is wrong.",
    Verdict.FAIL: "not healthy: see the lines that begin with `fail`.",
    Verdict.SHORT: "nothing is wrong so far, but what decides can't be said yet.",
    Verdict.LEFT_OUT: "nothing is wrong in the log, but whether φ got better was not measured.",
}


def report(findings: Sequence[Finding]) -> str:
    """Findings as lines for a terminal, and the conclusion."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:<{WIDTH}}{finding.what}")
        lines += [f"{'':<{WIDTH}}try: {advice}" for advice in finding.advice]
    verdict = overall(findings)
    return "\n".join([*lines, "", f"{verdict.value:<{WIDTH}}{CONCLUSIONS[verdict]}"])
