"""Bring the rows, trials and step times of races into the published race, which comes with the package.

    python tools/publish_race.py runs/race-mine ...

An entrant's rows in a folder replace those that were published under its name.
"""

from __future__ import annotations

import operator
import sys
from pathlib import Path

from lolo.race import records, stages
from lolo.race.records import KEPT, RaceRow, StepTime, Trial


def publish(folder: Path) -> None:
    """Merge one folder."""
    for file, kind, key in (
        (stages.ROWS_FILE, RaceRow, stages.RUN_OF),
        (stages.TRIALS_FILE, Trial, operator.attrgetter("kind", "workload")),
        (stages.TIMES_FILE, StepTime, stages.RUN_OF),
    ):
        if new := records.read(folder / file, kind):
            records.write(KEPT / file, records.with_new(records.read(KEPT / file, kind), new, key))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        publish(Path(name))
