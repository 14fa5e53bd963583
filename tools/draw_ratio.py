"""How large the task's meta-gradient is beside the imitation's: python tools/draw_ratio.py RUN FOLDER

RUN: a run folder of `lolo train`. Medians over 20 outer steps go to FOLDER/gradient-ratio.jsonl, their picture beside.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lolo.files import disk, jsonl
from lolo.studies import style
from lolo.studies.style import Curve
from lolo.training import run_log

TOGETHER = 20  # outer steps, of which the median is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rows = run_log.log_rows(arguments.run)
    found = [(row["step"], 1 / row["gradient_ratio"]) for row in rows if row.get("gradient_ratio")]
    steps, ratios = np.array(found).T
    whole = len(steps) // TOGETHER * TOGETHER
    x = steps[:whole].reshape(-1, TOGETHER).mean(axis=1)
    y = np.median(ratios[:whole].reshape(-1, TOGETHER), axis=1)
    drawn = [{"step": float(a), "ratio": round(float(b), 2)} for a, b in zip(x, y, strict=True)]
    text = "".join(jsonl.json_line(row) + "\n" for row in drawn)
    disk.write_bytes(arguments.folder / "gradient-ratio.jsonl", text.encode())
    style.save_figure(picture(x, y), arguments.folder / "gradient-ratio.svg")


@style.styled
def picture(x: np.ndarray, y: np.ndarray) -> Any:
    """The ratio against the outer step."""
    first, last = (np.exp(np.log(some).mean()) for some in (y[:5], y[-10:]))
    title = f"The task's gradient is {first:.0f} times the imitation's at first, {last:.0f} at last"
    figure, (axis,) = style.panels(1, title)
    style.draw_lines(axis, [Curve("lolo", x, y)], style.looks(["lolo"]))
    style.log_axis(axis)
    axis.set(xlabel="outer step", ylabel="ratio of the gradients' norms")
    style.explain(axis, f"before they are normalised (Eq. 5); medians over {TOGETHER} outer steps")
    return figure


if __name__ == "__main__":
    main()
