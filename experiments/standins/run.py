"""Optimizers and AdamW on the real stand-ins for the paper's tasks, with curves, throughput and peak memory.

    export LOLO_DATA=data
    lolo data prepare textures --to data/textures     # apt-get install openarena-081-textures
    lolo data prepare books --to data/books
    python experiments/standins/run.py lolo-small --out experiments/standins

Each job and optimizer runs in a process of its own, so that its peak memory is its own; a call that was stopped goes
on with what is left. One evaluation seed: these are single runs. `--smoke`: 5 steps of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk
from lolo.runtime import environment
from lolo.studies import candidates, plots, style
from lolo.studies.rows import save_rows, slug
from lolo.tasks import by_name

SEED = 0
WINDOW = long_runs.WINDOW
ADAMW = "adamw:1e-3"


@dataclasses.dataclass(frozen=True)
class Job:
    """One task and how long it is trained."""

    task: str
    steps: int = 2000
    window: int = WINDOW  # steps between two scores


JOBS = {
    "texture-mlp": Job("textures-mlp:score_examples=4096"),
    "texture-resnet18-w16": Job("textures-resnet18:width=16,batch=32,score_examples=1024"),
    "texture-resnet18-full": Job("textures-resnet18:batch=64,score_examples=64", steps=5, window=5),
    "books-gpt2-mini": Job("books-gpt2-mini:score_examples=64"),
}


def peak_memory_mb() -> int:
    """Highest memory on the GPU, or of this process. Not `ru_maxrss`: that begins with the memory of the parent."""
    on_device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in on_device:
        return on_device["peak_bytes_in_use"] // 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def run_one(name: str, optimizer: str, smoke: bool) -> dict:
    """One run in this process: its row, seconds per step, peak memory in MB."""
    environment.set_up()
    job = JOBS[name]
    steps, window = (5, 5) if smoke else (job.steps, job.window)
    splits = by_name.resolve(job.task)
    if smoke:  # the whole split takes longer than five steps
        splits = splits._replace(test=dataclasses.replace(splits.test, size=splits.test.score_batch))
    entries = [candidates.candidate(candidates.read([optimizer])[optimizer], splits, steps)]
    began, ticks = time.perf_counter(), list[float]()

    def on_steps(count: int) -> None:
        ticks.append(time.perf_counter())
        print(f"{name}, {optimizer}: step {count * len(ticks)} of {steps}, {ticks[-1] - began:.0f} s", file=sys.stderr)

    rows = long_runs.compare(
        name,
        splits,
        entries,
        [SEED],
        steps,
        on_steps=on_steps,
        window=window,
    )
    whole = time.perf_counter() - began
    spans = [(b - a) / window for a, b in zip(ticks, ticks[1:], strict=False)]  # without the first: it compiles
    return {
        "row": dataclasses.asdict(rows[0]),
        "task": job.task,
        "window": window,
        "batch": splits.train.batch,
        "seconds_per_step": statistics.median(spans) if spans else None,
        "seconds_in_all": round(whole, 1),
        "peak_memory_mb": peak_memory_mb(),
        "provenance": environment.provenance(),
    }


def part_file(out: Path, name: str, optimizer: str) -> Path:
    """Where one run's numbers are kept."""
    path = Path(optimizer)
    of = optimizer
    if path.suffix == ".safetensors":
        of = f"{path.parent.name}-{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    return out / "parts" / f"{name}-{slug(of)}.json"


def write_reports(out: Path, names: list[str], optimizers: list[str], command: str) -> None:
    """Rows, pictures and one table of all jobs."""
    lines = [
        "# Stand-ins for the paper's tasks",
        "",
        "Single runs: one evaluation seed, from the same init and batches. Train loss: mean of the last "
        f"{WINDOW} steps (of all, where there are fewer). Seconds per step: median over windows of {WINDOW} steps, "
        "scores included.",
        "",
        "| job | optimizer | steps | train loss | test loss | test accuracy | s/step | examples/s | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    parts = {}
    for name in names:
        found = [json.loads(part_file(out, name, optimizer).read_text()) for optimizer in optimizers]
        rows = [Row(**part["row"]) for part in found]
        save_rows(out / f"rows-{name}.jsonl", rows)
        if all(part["window"] == WINDOW for part in found):
            style.save_figure(plots.curves(rows), out / f"curves-{name}.svg")
        for part, row in zip(found, rows, strict=True):
            pace, memory = part["seconds_per_step"], part["peak_memory_mb"]
            speed = f"{pace:.3f} | {part['batch'] / pace:.0f}" if pace else "– | –"
            lines.append(
                f"| {name} | {row.optimizer} | {row.steps:,} | {row.train_loss:.4f} | {row.held_loss:.4f} | "
                f"{row.held['accuracy']:.4f} | {speed} | {f'{memory:,} MB' if memory else '–'} |"
            )
        parts[name] = found
    about = parts[names[0]][0]["provenance"]
    lines += ["", *(f"- {name}: `{JOBS[name].task}`" for name in names), ""]
    lines += [f"![curves](curves-{name}.svg)\n" for name in names if (out / f"curves-{name}.svg").is_file()]
    lines.append(
        f"Command: `{command}`. Versions: {about['versions']}. Commit: {about['commit']}. Machine: "
        f"{about['machine']['device']}, {about['machine']['cores']} cores."
    )
    disk.write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())


def main() -> None:
    """Run what is left, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="+", help="as `lolo eval` takes them; AdamW at 1e-3 comes with them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=JOBS, action="append", help="this job only; may be given again")
    parser.add_argument("--smoke", action="store_true", help="5 steps of each job")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names, optimizers = asked.only or list(JOBS), list(dict.fromkeys([*asked.optimizers, ADAMW]))
    if asked.child:
        print(json.dumps(run_one(names[0], asked.child, asked.smoke)))
        return
    (asked.out / "parts").mkdir(parents=True, exist_ok=True)
    for name in names:
        for optimizer in optimizers:
            part = part_file(asked.out, name, optimizer)
            if part.is_file():
                continue
            child = [sys.executable, __file__, optimizer, "--out", str(asked.out), "--only", name, "--child", optimizer]
            child += ["--smoke"] * asked.smoke
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            disk.write_bytes(part, done.stdout.splitlines()[-1].encode() + b"\n")
    write_reports(asked.out, names, optimizers, f"python {' '.join(sys.argv)}")
    print(asked.out / "report.md")


if __name__ == "__main__":
    main()
