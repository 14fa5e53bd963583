"""Is the memory that `lolo train --dry-run` states the memory that the run takes?

    export LOLO_DATA=data
    python experiments/plan/measure.py --out experiments/plan/memory.json

For each case (1 pair, truncations of 5 steps) a process of its own compiles the outer step from shapes, takes the plan
from it, and only then loads data and state and runs two outer steps. Measured: the highest resident memory while they
run, less the resident memory before anything was loaded. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

TOLERANCE = 0.15
CASES = {
    "mlp": "textures-mlp:batch=4096",
    "resnet18": "textures-resnet18:batch=256",
    "gpt2-mini": "books-gpt2-mini:batch=8,context=256",
}


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process by /proc; VmHWM is the highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_the_peak() -> None:
    """Gives freed memory back, and lets VmHWM begin again from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(name: str) -> dict:
    """Planned and measured bytes of one task."""
    from lolo.runtime import parallel

    parallel.use_cores(1)
    import jax

    from lolo.files import settings
    from lolo.method import meta
    from lolo.tasks import by_name as tasks
    from lolo.training import build, plan, recipes, slots
    from lolo.trees import count_bytes

    recipe = recipes.LOLO
    for field, value in {"tasks": (name,), "estimator.pairs": 1, "unroll.truncation": 5, "unroll.length": 10}.items():
        recipe = settings.with_field(recipe, field, value)
    setup, outline = build.build(recipe), tasks.outline(name)
    over = parallel.mesh(1)
    group = (outline.train,)
    step, shapes = plan.compiled_step(setup, group, over)
    stated = plan.memory_of(step, count_bytes(outline.train.data), beside=count_bytes(outline[1:]))
    key = jax.random.key(0)
    begin = jax.jit(partial(meta.meta_init, setup)).lower(plan.shapes(group), key).compile()

    forget_the_peak()
    before = resident()
    splits = tasks.resolve(name)
    # The outline's functions are what was compiled for; the data are all that differs.
    placed = parallel.place((dataclasses.replace(outline.train, data=splits.train.data),), over)
    state = parallel.place(begin(placed, key), over, slots.state_specs(shapes))
    jax.block_until_ready(state)
    forget_the_peak()
    for _ in range(2):
        state, _ = step(placed, state)
        jax.block_until_ready(state)
    taken = resident("VmHWM") - before
    return {
        "task": name,
        "planned_bytes": stated.total,
        "measured_bytes": taken,
        "ratio": round(taken / stated.total, 3),
        "parts": stated._asdict(),
    }


def main() -> int:
    """Every case in a process of its own; exit status 1 if one is off by more than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.child)))
        return 0
    found = {}
    for case in asked.only or CASES:
        child = [sys.executable, __file__, "--child", CASES[case]]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case}: planned {found[case]['planned_bytes']:,}, measured {found[case]['measured_bytes']:,} bytes")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(case["ratio"] - 1) > TOLERANCE for case in found.values()))


if __name__ == "__main__":
    sys.exit(main())
