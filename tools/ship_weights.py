"""Put weights of an experiment into the package, with their card: python tools/ship_weights.py SOURCE NAME ROWS...

SOURCE: a weights file. NAME: the name that `lolo.load` will know. ROWS: the rows of the evaluations that measured them;
the card's numbers are computed from these.
"""

import argparse
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from lolo.evaluation import statistics
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.studies import candidates
from lolo.studies.rows import load_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("name")
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--use", default="", help="settings that they are shipped with: clock_limit=10000,step_scale=2")
    parser.add_argument("--commit", required=True, help="the commit that the study ran at")
    parser.add_argument("--limits", required=True, help="what the weights are not for, in a sentence")
    arguments = parser.parse_args()
    weights = pretrained.load(arguments.source)
    use = candidates.parse_deployment(arguments.use, arguments.name, weights.learner)
    if use.schedule != "constant":
        parser.error(f"--use {arguments.use}: a schedule ends at a step that only a user knows; leave it out.")
    if use.words and weights.learner != architecture.learner_from_dict(weights.recipe["learner"], arguments.source):
        parser.error(f"{arguments.source} has deployment settings; give the weights as they were meta-trained.")
    learner = architecture.deployed(weights.learner, use.learner)
    if use.step_scale != 1.0:  # of small_fc
        learner = dataclasses.replace(learner, step_mult=learner.step_mult * use.step_scale)
    results, sums = dict[str, Any](), dict[str, str]()
    for file in arguments.rows:
        heading, losses = measured(file)
        if heading in results:
            parser.error(f"{file} holds rows of {heading} again")
        results[heading], sums[heading] = losses, hashlib.sha256(file.read_bytes()).hexdigest()
    card = {
        "summary": f"LoLO, {weights.recipe['outer']['steps']} outer steps on {', '.join(weights.recipe['tasks'])}",
        "data": weights.recipe["tasks"],
        "meta_seed": weights.recipe["seed"],
        "commit": arguments.commit,
        "results": results,
        "rows_sha256": sums,
        "limits": arguments.limits,
        "licence": "MIT",
    }
    target = weights_file.SHIPPED / f"{arguments.name}.safetensors"
    pretrained.save(target, weights._replace(learner=learner, card={**weights.card, **card}))
    print(f"{target.name}: {target.stat().st_size} bytes, {dataclasses.asdict(learner)}")


def measured(file: Path) -> tuple[str, dict[str, Any]]:
    """What rows are of, in words, and the losses of each optimizer."""
    rows = load_rows(file)
    results = {}
    for label in dict.fromkeys(row.optimizer for row in rows):
        train, held = (statistics.summary(rows, label, field) for field in ("train_loss", "held_loss"))
        n = f"{train.n} {train.unit}" if train.n > 1 else "single run"
        results[label] = {"train_loss": rounded(train), "test_loss": rounded(held), "n": n}
    return f"{rows[0].task}, {rows[0].steps} steps, mean and 95 % half-width", results


def rounded(interval: statistics.Interval) -> list[float]:
    return [round(x, 4) for x in (interval.mean, interval.half) if math.isfinite(x)]


if __name__ == "__main__":
    main()
