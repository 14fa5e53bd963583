"""Twenty short meta-trainings of known worth: `lolo doctor` calls at most one of them what it is not."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from lolo.evaluation import long_runs
from lolo.files import settings
from lolo.optimizers import architecture, pretrained
from lolo.tasks.by_name import resolve
from lolo.training import doctor, findings, loop, recipes, trial
from lolo.training.findings import Verdict

TASK = f"{pathlib.Path(__file__).parent / 'doctor_tasks.py'}:"
# N = 20 and T = 100: seconds, most of them compilation; the learner is SGD with a learned rate and momentum.
SMALL = {
    **{"tasks": ("quadratic",), "learner.name": "sgd", "unroll.length": 20, "unroll.truncation": 5},
    **{"estimator.pairs": 4, "estimator.sigma": 0.05, "imitation.lr": 0.05, "validation.every": 0},
    **{"outer.steps": 100, "outer.lr": 0.05, "outer.final_lr": 0.01},
}
NETWORK = {
    **{"learner.name": "small_fc", "learner.hidden": 4, "learner.step_mult": 0.05},
    **{"outer.steps": 200, "outer.lr": 0.01, "outer.final_lr": 0.003},
}

IMAGES = {
    **{"tasks": ("fashion-mlp:widths=16,batch=32",), "learner.name": "small_fc", "learner.hidden": 8},
    **{"unroll.length": 40, "unroll.truncation": 10, "estimator.sigma": 0.01, "imitation.lr": 0.003},
    **{"outer.steps": 150, "outer.lr": 0.01, "outer.final_lr": 0.003},
}


class Case(NamedTuple):
    """A recipe, and what its meta-training is worth."""

    good: bool
    recipe: str
    changes: dict[str, Any]  # to SMALL


CASES = {
    "naive-LO": Case(True, "naive", {}),
    "naive-LO, another seed": Case(True, "naive", {"seed": 1}),
    "LoLO": Case(True, "lolo", {}),
    "LoLO of small_fc on images": Case(True, "lolo", IMAGES),
    "LoLO with SGD as expert": Case(True, "lolo", {"imitation.expert": "sgdm", "imitation.lr": 0.3}),
    "BC-only": Case(True, "bc-only", {}),
    "replay alone": Case(True, "replay-only", {}),
    "ES of whole unrolls": Case(True, "naive", {"estimator.kind": "es", "unroll.truncations_per_update": 4}),
    "noise that is reused": Case(True, "naive", {"estimator.kind": "nres"}),
    "naive-LO of small_fc": Case(True, "naive", NETWORK),
    "a rate that is nothing": Case(False, "naive", {"outer.lr": 1e-9, "outer.final_lr": 1e-9}),
    "a rate that is far too large": Case(False, "naive", {"outer.lr": 3.0, "outer.final_lr": 1.0}),
    "sigma below float32": Case(False, "naive", {"estimator.sigma": 1e-10}),
    "a huge sigma": Case(False, "naive", {"estimator.sigma": 5.0}),
    "updates clipped to nothing": Case(False, "naive", {"outer.clip": 1e-8, "outer.clip_position": "after"}),
    "an expert that does not move": Case(False, "lolo", {"imitation.lr": 1e-6}),
    "two outer steps": Case(False, "lolo", NETWORK | {"outer.steps": 2}),
    "a loss of the wrong sign": Case(False, "naive", {"tasks": (f"{TASK}wrong_sign",)}),
    "a loss that nothing changes": Case(False, "naive", {"tasks": (f"{TASK}unconnected",)}),
    "one pair, and noise": Case(False, "naive", {"tasks": (f"{TASK}drowned",), "estimator.pairs": 1}),
}
"""By name. An eleventh bad one, which passed seven checks of an earlier doctor, is a test by itself."""


def make(case):
    recipe = recipes.RECIPES[case.recipe]
    for name, value in (SMALL | case.changes).items():
        recipe = settings.with_field(recipe, name, value)
    return recipe


def is_good(folder, recipe, points=40):
    """Whether φ beats its init, its start and its expert's first quarter by 1 %, on at least four of five other seeds.

    All are measured on the test split, after twice the doctor's steps unless `points` is less. The rule is that of the
    doctor; seeds, split and steps are not. As many seeds and as long windows as the doctor has: nothing is compiled.
    """
    splits, seeds = resolve(recipe.tasks[0]), [920_000 + i for i in range(5)]
    decay = architecture.of(recipe.learner).expert_decay(recipe.learner)
    trained = pretrained.load(folder / "last.safetensors").meta_params
    window = recipe.unroll.length // 10

    def curves(maker, values, points):
        each = [value for value in values for _ in seeds]
        steps = points * window
        ran = long_runs.run(splits.train, splits.test, maker, each, seeds * len(values), steps, window=window)
        return np.where(np.isfinite(ran.held_loss), ran.held_loss, 1e30).reshape(len(values), len(seeds), points)

    still = curves(trial.stand_still, [0.0], 1)[0, :, 0]
    early = curves(trial.expert_maker(recipe.imitation, decay), [0.0], points // 4)[0, :, -1]
    ours, start = curves(pretrained.maker(recipe.learner), [trained, trial.first_meta_params(recipe)], points)[:, :, -1]
    return bool((ours < 0.99 * np.minimum(np.minimum(still, start), early)).sum() >= 4)


def examined(folder, recipe):
    """The verdict on a new run, and its findings."""
    try:
        loop.train(recipe, folder)
    except loop.DivergedError:
        pass
    found = [*doctor.examine(folder), *trial.examine(folder)]
    return findings.overall(found), findings.report(found)


@pytest.mark.slow
def test_at_most_one_verdict_of_twenty_is_wrong(tmp_path):
    wrong, mislabelled, table = [], [], []
    for number, (name, case) in enumerate(CASES.items()):
        recipe, folder = make(case), tmp_path / str(number)
        verdict, said = examined(folder, recipe)
        if is_good(folder, recipe) != case.good:
            mislabelled.append(name)
        table.append(f"{'good' if case.good else 'bad':<6}{name:<32}{verdict.value}")
        print(table[-1])
        if (verdict is Verdict.OK) != case.good:
            wrong.append(f"{name}:\n{said}")
    assert sum(case.good for case in CASES.values()) == len(CASES) / 2 == 10
    assert not mislabelled
    assert len(wrong) <= 1, "\n\n".join([*table, *wrong])


@pytest.mark.slow
def test_sixty_outer_steps_on_fashion_mlp_are_not_called_healthy(tmp_path):
    """The paper's recipe, cut at 60 steps: far better than the untrained φ, which diverges, and useless."""
    recipe = settings.with_field(settings.with_field(recipes.LOLO, "outer.steps", 60), "validation.every", 0)
    verdict, said = examined(tmp_path / "run", recipe)
    assert verdict is Verdict.FAIL and "expert has" in said
    assert not is_good(tmp_path / "run", recipe, points=20)
