"""Draw the pictures of kept rows again: python tools/redraw.py FOLDER...

FOLDER: holds rows-TASK.jsonl, and about-TASK.json where weights were compared. No optimizer is run. Reports in the
folder then link to the new pictures, and pictures of before, which were .png, are removed.
"""

import argparse
import re
from pathlib import Path

from lolo.files import disk
from lolo.studies import comparison_report
from lolo.studies.rows import file_name, load_rows


def redraw(folder: Path) -> list[str]:
    """Names of the pictures that were drawn."""
    drawn: list[str] = []
    for path in sorted(folder.glob("rows-*.jsonl")):
        rows = load_rows(path)
        if rows[0].steps < 200:  # a curve has a point for every 100
            continue
        name = file_name(rows[0].task)
        about_file = folder / f"about-{name}.json"
        about = disk.read_json(about_file) if about_file.is_file() else {}
        links = comparison_report.draw(folder, name, rows, about.get("unroll"), about.get("weights") or {})
        drawn += [re.search(r"\((.*)\)$", link)[1] for link in links]
    for name in drawn:
        (folder / name).with_suffix(".png").unlink(missing_ok=True)
    for report in folder.glob("report*.md"):
        text = report.read_text(encoding="utf-8")
        for name in drawn:
            text = text.replace(f"({name.removesuffix('.svg')}.png)", f"({name})")
        disk.write_bytes(report, text.encode())
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    for folder in parser.parse_args().folders:
        for name in redraw(folder):
            print(folder / name)


if __name__ == "__main__":
    main()
