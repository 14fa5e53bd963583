"""Optimizers compared on a task: their rows, kept as they come, and the report on them.

A comparison's folder holds rows (`rows-TASK.jsonl`), what is known about them (`about-TASK.json`), table, report and
pictures, named alike; `parts/` keeps the rows of each optimizer as they come, `spent.jsonl` the time that each piece
of work took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lolo import contestants, plots
from lolo.evaluation import baselines, long_runs, statistics
from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl, tensors
from lolo.files.disk import FileError
from lolo.method.task import Splits
from lolo.optimizers import architecture, pretrained
from lolo.runtime import environment, interrupt, parallel
from lolo.runtime.process_group import ALONE
from lolo.tasks import by_name
from lolo.training import run_folder
from lolo.training.run_folder import RunError


def slug(text: str) -> str:
    """A text as part of a file's name: "lolo replay.read=pop" -> "lolo-replay.read-pop"."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


@contextlib.contextmanager
def timed(out: Path, what: str) -> Iterator[None]:
    """Adds the time that a piece of work took, finished or not, to `spent.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        yield
    finally:
        row = {"what": what, "seconds": round(time.monotonic() - began, 1), "cores": parallel.cores()}
        jsonl.append_json_line(out / "spent.jsonl", row)


def hours(folder: Path, what: Sequence[str]) -> str:
    """The time that this work took by `spent.jsonl`, in words. What was made elsewhere is not there."""
    file, by_cores = folder / "spent.jsonl", dict[int, float]()
    for row in jsonl.read_json_lines(file, _SPENT_ROW) if file.is_file() else ():
        if row["what"] in what:
            by_cores[row["cores"]] = by_cores.get(row["cores"], 0.0) + row["seconds"] / 3600
    return " and ".join(f"{took:.2f} h on {n} core{'s' * (n > 1)}" for n, took in by_cores.items()) or "no time here"


_SPENT_ROW = jsonl.fields(what=jsonl.string, seconds=jsonl.number, cores=jsonl.whole_number)


def evaluate(
    names: Sequence[str | Path],
    task: str,
    steps: int,
    seeds: int,
    told: interrupt.OnProgress = interrupt.no_progress,
    parts: Path | None = None,
    methods: Mapping[str, str] = types.MappingProxyType({}),
    splits: Splits | None = None,
) -> tuple[list[Row], dict[str, pretrained.Weights]]:
    """Every named optimizer on a task, from the same inits and batches.

    Args:
      names: weights (a shipped name or a file, `:clock_limit=10000,weight_decay=0.1,schedule=cosine` after it for other
        use than they came with), `adamw:1e-3`, `adam:…`, `sgdm:…`, `adamw:grid`.
      parts: a folder that keeps the rows of each method as they come; those found there are not made again.
      methods: as `named_weights` takes them.
      splits: of the task, by whoever has resolved it before: a user's task may take long to make.

    Returns: the rows, and the weights by label and meta-seed. Raises ValueError, FileError.
    """
    unique = contestants.distinct(names)  # what is wrong with a name is said now rather than after hours
    long_runs.check_steps(steps)
    named = contestants.named_weights(unique, methods)
    splits = splits or by_name.resolve(task)
    files_of = {} if parts is None else _part_files(parts, task, unique, named)
    for file in files_of.values():
        file.parent.mkdir(parents=True, exist_ok=True)

    def size(name: str) -> int:
        return (seeds + baselines.grid_size(name)) * steps

    found = {name: _kept(file, task, steps, seeds, named.get(name)) for name, file in files_of.items()}
    rows_of = {name: rows for name, rows in found.items() if rows}
    total, done = sum(map(size, unique)), sum(map(size, rows_of))

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        told(f"evaluating on {task}", done, total, "")

    groups: dict[str, list[str]] = {}  # those of one label run together
    for name in unique:
        if name not in rows_of:
            groups.setdefault(named[name].label if name in named else name, []).append(name)
    for members in groups.values():
        with timed(parts.parent, f"evaluating {file_name(task)}") if parts else contextlib.nullcontext():
            entries = [contestants.contestant(name, named, splits, steps, advanced) for name in members]
            made = long_runs.compare(task, splits, entries, range(seeds), steps, advanced=advanced)
        for name, entry in zip(members, entries, strict=True):
            rows_of[name] = [row for row in made if (row.optimizer, row.meta_seed) == (entry.label, entry.meta_seed)]
            if name in files_of:
                save_rows(files_of[name], rows_of[name])
    rows = [row for name in unique for row in rows_of[name]]
    return rows, {f"{label}, meta-seed {seed}": weights for label, seed, weights, _ in named.values()}


def _part_files(
    parts: Path, task: str, names: Sequence[str], named: Mapping[str, contestants.Named]
) -> dict[str, Path]:
    """Where the rows of each name are kept: weights by what is in them, a baseline by what it is."""
    place = file_name(task) + "".join(by_name.pin(task).partition("@")[1:])[:9]  # of a user's file: how its sum begins

    def part(name: str) -> str:
        if name in named:
            digest = hashlib.sha256(_contents(named[name]).encode()).hexdigest()[:8]
            return f"{slug(named[name].label)[:160]}-{digest}.jsonl"
        lr = contestants.learning_rate(name)
        return slug(f"{name.partition(':')[0]}-{lr if isinstance(lr, str) else f'{lr:g}'}") + ".jsonl"

    return {name: parts / place / part(name) for name in names}


def _digest(weights: pretrained.Weights) -> str:
    """Of φ alone."""
    return tensors.digest({name: np.asarray(x) for name, x in weights.meta_params.items()})


def _contents(named: contestants.Named) -> str:
    """A digest of weights in use: φ, and the settings that they came with where these are not their recipe's."""
    weights, changes = named.weights, named.use.changes
    digest = _digest(weights)
    learner, own = dataclasses.asdict(weights.learner), weights.recipe.get("learner", {})
    meta_trained = dataclasses.asdict(architecture.learner_from_dict(own, "recipe")) if own else {}
    return digest if learner | changes == meta_trained | changes else f"{digest} {learner}"


def _part_rows(file: Path) -> list[Row]:
    try:
        return load_rows(file)
    except FileError as error:
        raise FileError(f"{error} Remove it, and its rows are made again.") from error


def _kept(file: Path, task: str, steps: int, seeds: int, named: contestants.Named | None) -> list[Row] | None:
    """Rows of a part, if it is there and holds this task's, so many steps long, one for each seed, of these weights."""
    if not file.exists():
        return None
    rows = _part_rows(file)
    label, meta_seed = (rows[0].optimizer, None) if named is None else (named.label, named.meta_seed)
    wanted = [(task, steps, label, meta_seed, seed) for seed in range(seeds)]
    there = [(row.task, row.steps, row.optimizer, row.meta_seed, row.seed) for row in rows]
    return rows if sorted(there, key=lambda of: of[-1]) == wanted else None


def shown(i: statistics.Interval, signed: bool = False) -> str:
    """An interval in a cell of a table."""
    mean = f"{i.mean:+.4f}" if signed else f"{i.mean:.4f}"
    half = f" ± {i.half:.4f}" if math.isfinite(i.half) else ""
    return f"{mean}{half} (n={i.n} {i.unit})" if i.n > 1 else f"{mean} (single run)"


def meta_seed_tables(rows: Sequence[Row]) -> str:
    """Markdown: each φ by itself, and paired differences within each meta-seed; "" without several meta-seeds."""
    seeds = sorted({row.meta_seed for row in rows if row.meta_seed is not None})
    learned = list(dict.fromkeys(row.optimizer for row in rows if row.meta_seed is not None))
    if len(seeds) < 2:
        return ""
    heads = [f"meta-seed {seed}" for seed in seeds]

    def lines(what: str, cells: dict[str, list[str]]) -> list[str]:
        body = [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]
        return [f"| {what} | {' | '.join(heads)} |", "| --- |" + " --- |" * len(seeds), *body]

    def only(seed: int) -> list[Row]:
        return [row for row in rows if row.meta_seed == seed]

    def in_each(cell: Callable[[list[Row]], str]) -> list[str]:
        return [cell(only(seed)) for seed in seeds]

    def losses(label: str, mine: list[Row]) -> str:
        end, lowest = (statistics.summary(mine, label, field).mean for field in ("train_loss", "train_minimum"))
        return f"{end:.4f} ({end - lowest:+.4f})"

    def gap(a: str, b: str, mine: list[Row]) -> str:
        return shown(statistics.paired_difference(mine, a, b), signed=True)

    def have(labels: Sequence[str]) -> bool:
        return all(any(row.optimizer == label for row in only(seed)) for label in labels for seed in seeds)

    each = {label: in_each(partial(losses, label)) for label in learned if have([label])}
    pairs = {f"{a} − {b}": in_each(partial(gap, a, b)) for a, b in itertools.combinations(learned, 2) if have([a, b])}
    first = lines("train loss (above its own lowest mean of 100 steps)", each)
    return "\n".join([*first, "", *lines("difference in train loss, within a meta-seed", pairs)] if pairs else first)


def cells(rows: Sequence[Row], reference: str | None = None) -> list[list[str]]:
    """Header and one row per optimizer: means with 95 % intervals, and paired differences with `reference`."""
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    reference = reference or labels[0]
    differences = [f"{reference} − it, train", f"{reference} − it, held-out"]
    found = [["optimizer", "train loss", "held-out loss", *differences, "diverged"]]

    def difference(label: str, field: str) -> str:
        if label == reference:
            return ""
        try:
            return shown(statistics.paired_difference(rows, reference, label, field), signed=True)
        except ValueError:  # several meta-seeds on either side, and none in common
            return "no pairs"

    for label in sorted(labels, key=lambda name: statistics.summary(rows, name).mean):
        mine = [row for row in rows if row.optimizer == label]
        line = [label, shown(statistics.summary(rows, label)), shown(statistics.summary(rows, label, "held_loss"))]
        line += [difference(label, field) for field in ("train_loss", "held_loss")]
        found.append([*line, f"{sum(row.diverged for row in mine)} of {len(mine)}"])
    return found


def reference_of(rows: Sequence[Row]) -> str:
    """The optimizer that the others are compared with: lolo, else the first."""
    labels = [row.optimizer for row in rows]
    return "lolo" if "lolo" in labels else labels[0]


def table(rows: Sequence[Row]) -> str:
    """`cells` as Markdown, compared with LoLO, or with the first optimizer."""
    header, *lines = cells(rows, reference_of(rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, whole or not at all."""
    disk.write_bytes(path, "".join(jsonl.json_line(dataclasses.asdict(row)) + "\n" for row in rows).encode())


_ROW_FIELDS: dict[str, Callable[[Any], Any]] = {
    "task": jsonl.string,
    "optimizer": jsonl.string,
    "meta_seed": lambda value: None if value is None else jsonl.whole_number(value),
    "seed": jsonl.whole_number,
    "steps": jsonl.whole_number,
    "train_loss": jsonl.number,
    "train_minimum": jsonl.number,
    "held_loss": jsonl.number,
    "held": jsonl.named(jsonl.number),
    "diverged": jsonl.flag,
    "train_curve": jsonl.listed(jsonl.number),
    "held_curve": jsonl.listed(jsonl.number),
}


def _row(row: Any) -> dict[str, Any]:
    row = jsonl.fields(**_ROW_FIELDS)(row)
    other = sorted(set(row) - set(_ROW_FIELDS))
    if other:
        raise ValueError(f"field {other[0]!r} is not of this version of lolo")
    if {len(row["train_curve"]) * long_runs.WINDOW, len(row["held_curve"]) * long_runs.WINDOW} != {row["steps"]}:
        raise ValueError(f"its curves have no number for each {long_runs.WINDOW} of {row['steps']} steps")
    return row


def load_rows(path: Path) -> list[Row]:
    """Rows of `save_rows`, checked: one task, at least one row, curves of one length. Raises FileError."""
    rows = [Row(**row) for row in jsonl.read_json_lines(path, _row)]
    if not rows:
        raise FileError(f"{path}: holds no whole row.")
    shapes = {(row.task, row.steps, len(row.train_curve), len(row.held_curve)) for row in rows}
    if len(shapes) != 1:
        raise FileError(f"{path}: expected rows of one task and one number of steps, found {len(shapes)} kinds.")
    return rows


def file_name(task: str) -> str:
    """What the files of a task are named after: its name, or the name of the user's file and function; its settings."""
    match = by_name.NAME.fullmatch(task)
    if not match:
        return task
    words = (match["path"] and Path(match["path"]).stem, match["function"], match["settings"])
    return "-".join(filter(None, words)).replace("/", "-")


@contextlib.contextmanager
def kept_in(out: Path, task: str, names: Sequence[str], steps: int, seeds: int) -> Iterator[Path]:
    """Keep a folder to one evaluation by `lolo eval`. Gives the folder of its parts.

    The folder may be empty, or hold an evaluation of the same task, steps and seeds: this one goes on with it, and
    further optimizers come to it. Raises RunError where rows would be lost or mixed with others, FileError for damaged
    ones. What a user's task reads besides its own file is not looked at.
    """
    unique = contestants.distinct(names)
    named = contestants.named_weights(unique)
    long_runs.check_steps(steps)
    if (out / "recipe.json").exists():
        raise RunError(f"{out} already holds recipe.json of a run; give another --out.")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise RunError(f"{out} can't be written ({nearest} is in the way); give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    with run_folder.exclusive(out, ALONE):
        if (command := command_of(out, task)) and not command.startswith("lolo eval "):
            raise RunError(f"{out} already holds what {command!r} wrote; give another --out.")
        kept = _part_files(out / "parts", task, unique, named)
        path = out / f"rows-{file_name(task)}.jsonl"
        before = [file for file in kept.values() if file.exists()]
        found = [*map(_part_rows, before), *([load_rows(path)] if path.exists() else ())]
        for rows in found:
            there = rows[0].task, rows[0].steps, len({row.seed for row in rows})
            if there != (task, steps, seeds):
                words = f"{there[0]}, {there[1]:,} steps, seeds 0 to {there[2] - 1}"
                raise RunError(f"{out} already holds rows of {words}; give another --out.")
        if path.exists():
            _require_all(out, found[-1], found[:-1])
        _require_versions(out, out / "parts" / "versions.json")
        yield out / "parts"


def _require_versions(out: Path, file: Path) -> None:
    """Raise RunError unless `file` names the versions of today; write it where there is none."""
    if not file.exists():
        disk.write_json(file, environment.versions())
    versions = jsonl.checked(jsonl.named(jsonl.string), disk.read_json(file), str(file))
    if versions != environment.versions():
        words = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise RunError(f"{out} already holds rows made with {words}; give another --out.")


def _require_all(out: Path, reported: Sequence[Row], kept: Sequence[Sequence[Row]]) -> None:
    """Raise RunError unless all rows of a report are kept."""
    again = {jsonl.json_line(dataclasses.asdict(row)) for rows in kept for row in rows}
    lost = {row.optimizer for row in reported if jsonl.json_line(dataclasses.asdict(row)) not in again}
    if lost:
        raise RunError(
            f"{out} already holds rows of {', '.join(sorted(lost))} that this command would drop: it does not name "
            "them, or weights or task have changed, or parts/ is incomplete. Name all that it holds and what is to "
            "come to it, or give another --out."
        )


def command_of(out: Path, task: str) -> str | None:
    """The command that wrote the report on a task in `out`; None where there is none. Raises FileError."""
    about = out / f"about-{file_name(task)}.json"
    if not about.exists():
        return None
    return jsonl.checked(jsonl.fields(command=jsonl.string), disk.read_json(about), str(about))["command"]


def write_report(
    out: Path,
    task: str,
    rows: Sequence[Row],
    weights: dict[str, pretrained.Weights],
    command: str,
    note: str = "",
    pictures: Sequence[str] = (),
) -> str:
    """Rows, table, pictures and a short report in `out`, named after the task. Returns the table.

    `pictures`: further ones for the report, Markdown.
    """
    name = file_name(task)
    save_rows(out / f"rows-{name}.jsonl", rows)  # first: whatever goes wrong below, they took the time
    text = table(rows)
    unrolls = {w.recipe["unroll"]["length"] for w in weights.values() if w.recipe}
    unroll = unrolls.pop() if len(unrolls) == 1 else None
    title = f"{task}, {rows[0].steps:,} steps"
    plots.save_figure(plots.curves(rows, unroll, title), out / f"curves-{name}.png")
    pictures = [f"![curves](curves-{name}.png)", *pictures]
    if len({row.optimizer for row in rows}) > len(plots.COLOURS):  # too many for an eye to follow
        plots.save_figure(plots.finals(rows, title), out / f"finals-{name}.png")
        pictures.insert(0, f"![losses at the last step](finals-{name}.png)")
    digests = {label: _digest(one) for label, one in weights.items()}
    started: dict[str, Counter[str]] = {}  # of each method, over its meta-seeds
    seen = set()
    for label, one in weights.items():
        counts, key = one.card.get("start_steps_per_250"), (digests[label], repr(one.recipe))
        if counts and key not in seen:  # the same weights may be there in several uses
            started.setdefault(label.partition(", meta-seed ")[0], Counter()).update(counts)
            seen.add(key)
    if 0 < len(started) <= len(plots.COLOURS):
        plots.save_figure(plots.start_steps(started), out / f"start-steps-{name}.png")
        pictures.append(f"![realised start steps](start-steps-{name}.png)")
    about = {"command": command, "note": note, "unroll": unroll, **environment.provenance()}
    kept = {label: {"sha256": digests[label], "card": w.card} for label, w in weights.items()}
    disk.write_json(out / f"about-{name}.json", jsonl.json_safe({**about, "weights": kept}))
    diverged = sum(row.diverged for row in rows)
    paragraphs = [
        f"# {task}, {rows[0].steps:,} inner steps",
        note,
        text,
        f"Train loss: mean over the last {long_runs.WINDOW} steps. ±: 95 % t interval. All optimizers start from the "
        f"same inits and see the same batches; {diverged} of {len(rows)} runs diverged. The grid's learning rate was "
        "picked on other seeds.",
        meta_seed_tables(rows),
        *pictures,
        f"Command: `{command}`. Versions: {about['versions']}. Commit: {about['commit']}. "
        f"Machine: {about['machine']['device']}, {about['machine']['cores']} cores.",
    ]
    report = "\n\n".join(filter(None, paragraphs)) + "\n"
    disk.write_bytes(out / f"report-{name}.md", report.encode())
    disk.write_bytes(out / f"table-{name}.md", (text + "\n").encode())
    return text
