"""Draw some optimizers of a study: python tools/draw_curves.py ROWS PICTURE OPTIMIZER...

ROWS: a rows-TASK.jsonl of a study. PICTURE: an .svg, .png or .pdf. OPTIMIZER: as the rows call it; the first of LoLO's
is what the title is about.
"""

import argparse
from pathlib import Path

from lolo.studies import plots, style
from lolo.studies.rows import load_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("optimizers", nargs="+", metavar="OPTIMIZER")
    parser.add_argument("--unroll", type=int, default=1000, help="inner steps of meta-training, marked in the picture")
    parser.add_argument("--losses", nargs="+", choices=plots.LOSSES, default=["train"], help="one panel for each")
    arguments = parser.parse_args()
    rows = load_rows(arguments.rows)
    known = list(dict.fromkeys(row.optimizer for row in rows))
    missing = [name for name in arguments.optimizers if name not in known]
    if missing:
        parser.error(f"no rows of {missing[0]!r} in {arguments.rows}; there are {', '.join(map(repr, known))}")
    picture = plots.curves(rows, arguments.unroll, arguments.optimizers, arguments.losses)
    style.save_figure(picture, arguments.picture)


if __name__ == "__main__":
    main()
