"""The paper's meta-training to the byte: φ against Eq. 1-5 written out again, on the machine that runs the test.

Bytes of φ differ between kinds of machines, so none are stored. What an added setting does to the paper's path where it
is at its default shows here: a clip around α from 0 to 1, which changes no α, was seen from outer step 11 on (x86, JAX
0.10), because XLA then rounds 1 − α otherwise. A quadratic did not show it; this small network did.
"""

from functools import partial

import jax
import pytest
import textbook_paper
from helpers import same, small

from lolo.method import imitation, meta
from lolo.tasks.small import fashion_mlp
from lolo.training import build
from lolo.training.recipes import LOLO

STEPS = 20
SIZES = {"learner.name": "small_fc", "learner.hidden": 4, "estimator.pairs": 2, "outer.steps": STEPS}


def phi_of(setup):
    """φ after each outer step."""
    task_group = (fashion_mlp("4", 8).train,)
    step, found = jax.jit(partial(meta.meta_step, setup)), []
    state = jax.jit(partial(meta.meta_init, setup))(task_group, jax.random.key(0))
    for _ in range(STEPS):
        state, _ = step(task_group, state)
        found.append(jax.device_get(state.meta_params))
    return found


@pytest.mark.slow
def test_phi_of_the_papers_recipe_has_the_bytes_of_its_equations(monkeypatch):
    setup = build.build(small(LOLO, SIZES))
    ours = phi_of(setup)
    assert not same(ours[0], ours[-1])

    def fuse_with(fuse):
        return lambda alpha, deltas, valid, normalize, floor, loss: fuse(
            alpha, normalize(deltas.task, valid), normalize(deltas.bc, valid)
        )

    alpha = partial(textbook_paper.alpha, total=STEPS)
    loss = imitation.ImitationLoss(textbook_paper.distance, weights=1.0)
    textbook = setup._replace(
        alpha_mix=alpha, alpha_loss=alpha, imitation_loss=loss, normalize=textbook_paper.psi, floor=float("nan")
    )
    monkeypatch.setattr(imitation, "mix_updates", textbook_paper.mix)
    monkeypatch.setattr(imitation, "fuse", fuse_with(textbook_paper.fuse))
    assert [same(a, b) for a, b in zip(ours, phi_of(textbook), strict=True)] == [True] * STEPS
    monkeypatch.setattr(imitation, "fuse", fuse_with(textbook_paper.fuse_otherwise))
    assert not same(phi_of(textbook)[-1], ours[-1])  # the test can tell last bits
