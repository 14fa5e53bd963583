"""Bring the rows, trials and step times of races into the published race, which comes with the package.

    python tools/publish_race.py runs/race-mine ...

An entrant's rows in a folder replace those that were published under its name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lolo.race import records, stages
from lolo.race.records import KEPT, RaceRow, StepTime, Trial


def publish(folder: Path) -> None:
    """Merge one folder."""
    for file, kind, key in (
        (stages.ROWS_FILE, RaceRow, lambda row: (row.entrant, row.workload)),
        (stages.TRIALS_FILE, Trial, lambda trial: (trial.kind, trial.workload)),
        (stages.TIMES_FILE, StepTime, lambda time: (time.entrant, time.workload)),
    ):
        new = records.read(folder / file, kind)
        replaced = {key(record) for record in new}
        there = [record for record in records.read(KEPT / file, kind) if key(record) not in replaced]
        if new:
            records.write(KEPT / file, [*there, *new])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        publish(Path(name))
