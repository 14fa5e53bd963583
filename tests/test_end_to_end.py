"""Meta-training works: a small learned optimizer beats its untrained self and tuned SGD on data it never saw."""

import jax
import numpy as np
import optax
import pytest

from lolo.evaluation import long_runs
from lolo.files import settings
from lolo.optimizers import architecture, pretrained
from lolo.tasks.small import fashion_mlp
from lolo.training import build, loop, recipes

STEPS = 100
SEEDS = (0, 1, 2)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def recipe():
    small = recipes.NAIVE
    for name, value in {
        "outer.steps": 100,
        "unroll.length": STEPS,
        "unroll.truncation": 20,
        "learner.hidden": 16,
        "learner.step_mult": 1e-2,
        "estimator.pairs": 4,
        "validation.every": 0,
    }.items():
        small = settings.with_field(small, name, value)
    return small


def sgd(setting):
    return optax.sgd(setting["lr"])


def losses(make, setting):
    """Test loss after STEPS steps, one number per seed."""
    splits = fashion_mlp()
    return long_runs.run(
        splits.train, splits.test, make, [setting] * len(SEEDS), SEEDS, STEPS
    ).final["loss"]  # fmt: skip


def meta_trained():
    result = loop.train(recipe(), None)
    return losses(pretrained.maker(result.weights.learner), result.weights.meta_params)


@pytest.fixture(scope="module")
def best_sgd():
    return min((losses(sgd, {"lr": lr}) for lr in RATES), key=np.mean)


@pytest.fixture(scope="module")
def untrained():
    learner = architecture.build_learner(recipe().learner)
    return losses(learner.optimizer, learner.init(jax.random.key(0)))


def test_a_meta_trained_optimizer_beats_its_untrained_self_and_tuned_sgd(best_sgd, untrained):
    trained = meta_trained()
    assert (trained < untrained).all()
    assert (trained < best_sgd).all()


@pytest.mark.slow
def test_with_the_meta_gradient_s_sign_flipped_it_does_not(monkeypatch, best_sgd):
    ascend = build.build_outer
    monkeypatch.setattr(build, "build_outer", lambda outer: optax.chain(optax.scale(-1.0), ascend(outer)))
    flipped = meta_trained()
    assert not (flipped < best_sgd).any()
