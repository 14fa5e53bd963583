"""How much weight decay suits a long run? python experiments/recipe/decay.py

Trains `lolo-norm-2` with several decays, and AdamW, over 10,000 to 100,000 steps, and scores them on validation data,
on the seed of the race's search and the next. Rows go to decay.jsonl beside this file; those that are there are not
made again.
"""

import argparse
import dataclasses
from pathlib import Path

from lolo.evaluation import long_runs
from lolo.files import disk, jsonl
from lolo.race import validation
from lolo.studies import candidates
from lolo.tasks import by_name

OURS = "lolo-norm-2:schedule=warmup-cosine,warmup=0.05"
ADAMW = "adamw-warmup-cosine:1e-2,warmup=0.05"
SMALL = [f"{OURS},weight_decay={decay}" for decay in (0.03, 0.01, 0.003)]
LONG = [f"{OURS},weight_decay={decay}" for decay in ("0.01", "0.002", "0.002,learning_rate=8e-3")]
MODELS = [OURS, *(f"{OURS},weight_decay={decay}" for decay in (0.05, 0.02))]
RUNS = (  # task, steps, seeds, optimizers
    *((task, 20_000, 2, [OURS, *SMALL, ADAMW]) for task in ("fashion-mlp", "books-mlp")),
    *((task, 100_000, 2, [*LONG, ADAMW, f"{ADAMW},weight_decay=0.01"]) for task in ("fashion-mlp", "books-mlp")),
    ("books-transformer:width=64,heads=4,context=32", 10_000, 1, MODELS),
    ("fashion-conv:widths=16-32", 10_000, 1, MODELS),
    ("fashion-mlp:widths=256-256", 10_000, 1, MODELS),
)
KEPT = ("task", "steps", "seed", "train_loss", "held_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decay.jsonl"))
    out = parser.parse_args().out
    rows = list(jsonl.read_json_lines(out, dict)) if out.exists() else []
    for task, steps, seeds, names in RUNS:
        there = {row["optimizer"] for row in rows if (row["task"], row["steps"]) == (task, steps)}
        for name, named in candidates.read([name for name in names if name not in there]).items():
            splits, of = by_name.resolve(task), validation.seeds_of(seeds)
            candidate = candidates.candidate(named, splits, steps, lambda steps: None)
            made = map(dataclasses.asdict, long_runs.compare(task, splits, [candidate], of, steps, held="validation"))
            rows += [{"optimizer": name, **{field: row[field] for field in KEPT}} for row in made]
            print(*rows[-seeds:], sep="\n", flush=True)
            disk.write_bytes(out, "".join(jsonl.json_line(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
