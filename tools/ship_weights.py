"""Put weights of an experiment into the package, with their card: python tools/ship_weights.py SOURCE NAME ROWS.

SOURCE: a weights file. NAME: the name that `lolo.load` will know. ROWS: the rows of the study that measured them; the
card's numbers are computed from these.
"""

import argparse
import dataclasses
import hashlib
from pathlib import Path

from lolo import evaluation, files, pretrained, studies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("name")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--commit", required=True, help="the commit that the study ran at")
    parser.add_argument("--limits", required=True, help="what the weights are not for, in a sentence")
    arguments = parser.parse_args()
    weights = pretrained.load(arguments.source)
    rows = studies.load_rows(arguments.rows)
    task, steps = rows[0].task, rows[0].steps
    results = {}
    for label in dict.fromkeys(row.optimizer for row in rows):
        train, held = (evaluation.summary(rows, label, field) for field in ("train_loss", "held_loss"))
        results[label] = {
            "train_loss": [round(train.mean, 4), round(train.half, 4)],
            "test_loss": [round(held.mean, 4), round(held.half, 4)],
            "n": f"{train.n} {train.unit}",
        }
    card = {
        "summary": f"LoLO, {weights.recipe['outer']['steps']} outer steps on {', '.join(weights.recipe['tasks'])}",
        "data": weights.recipe["tasks"],
        "meta_seed": weights.recipe["seed"],
        "commit": arguments.commit,
        "results": {f"{task}, {steps} steps, mean and 95 % half-width": results},
        "rows_sha256": hashlib.sha256(arguments.rows.read_bytes()).hexdigest(),
        "limits": arguments.limits,
        "licence": "MIT",
    }
    target = files.SHIPPED / f"{arguments.name}.safetensors"
    pretrained.save(target, weights._replace(card={**weights.card, **card}))
    print(f"{target.name}: {target.stat().st_size} bytes, {dataclasses.asdict(weights.learner)}")


if __name__ == "__main__":
    main()
