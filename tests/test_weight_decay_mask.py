"""A mask for weight decay means what it means in `optax.adamw`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import same

import lolo
from lolo.optimizers import architecture
from lolo.optimizers.pretrained import Weights

pytestmark = pytest.mark.slow  # nearly all of it is compilation

LEARNER = architecture.ARCHITECTURES["norm_fc"].settings()
WEIGHTS = {
    "small_fc": lolo.load("lolo-anytime"),
    "norm_fc": Weights(architecture.build_learner(LEARNER).init(jax.random.key(0)), LEARNER, {}, {}),
}
all_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)

PARAMS = {"layer": {"weight": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(2), "nothing": None}
GRADS = jax.tree.map(lambda x: jnp.linspace(0.1, 1.0, x.size).reshape(x.shape), PARAMS)
MASKS = {
    "tree": {"layer": {"weight": True, "bias": False}, "scale": False, "nothing": None},
    "prefix": {"layer": True, "scale": False, "nothing": None},
    "callable": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    "callable prefix": lambda params: {"layer": False, "scale": True, "nothing": None},
    "one word": False,
    "arrays": {
        "layer": {"weight": np.array(True), "bias": jnp.array(False)},
        "scale": np.bool_(False),
        "nothing": None,
    },
}
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def updates_of(optimizer):
    return jax.jit(optimizer.update)(GRADS, optimizer.init(PARAMS), PARAMS)[0]


def decayed(make, mask):
    """For each parameter, whether the mask lets it decay; an update is that of all or of none."""
    masked, everywhere, nowhere = (
        jax.tree.leaves(updates_of(make(**options)))
        for options in ({"weight_decay": 0.5, "mask": mask}, {"weight_decay": 0.5}, {"weight_decay": 0.0})
    )
    answers = [bool(np.allclose(x, y, rtol=1e-5, atol=0)) for x, y in zip(masked, everywhere, strict=True)]
    for x, y, z, answer in zip(masked, everywhere, nowhere, answers, strict=True):
        np.testing.assert_allclose(x, y if answer else z, rtol=1e-5)
        assert not np.allclose(y, z, rtol=1e-3)  # so that the two can be told apart
    return answers


@all_weights
@all_masks
def test_the_same_parameters_decay_as_in_adamw(weights, mask):
    assert decayed(weights.optimizer, mask) == decayed(lambda **options: optax.adamw(1e-3, **options), mask)


@all_weights
def test_a_mask_of_all_parameters_changes_no_bit(weights):
    assert same(
        updates_of(weights.optimizer(weight_decay=0.5, mask=True)), updates_of(weights.optimizer(weight_decay=0.5))
    )


@all_weights
def test_a_mask_goes_with_a_decay_that_is_injected(weights):
    make = optax.inject_hyperparams(weights.optimizer, static_args="mask")
    for mask in (MASKS["tree"], MASKS["callable"]):
        ours, expected = (f(weight_decay=0.5, mask=mask) for f in (make, weights.optimizer))
        for x, y in zip(*(jax.tree.leaves(updates_of(optimizer)) for optimizer in (ours, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)


@all_weights
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"layer": True}, "mask is neither the parameters' tree nor a prefix of it"),
        ({"layer": 1.0, "scale": True, "nothing": None}, "mask says 1.0; expected True, for weight decay, or False"),
        (lambda params: {"layer": True}, "mask is neither"),
        (np.array([True]), r"mask says array\(\[ True\]\); expected True"),
        (np.array(1), r"mask says array\(1\); expected True"),
        (lambda params: jax.tree.map(lambda x: x.sum() > 0, params), 'traced.*outside of jit.*static_args="mask"'),
    ],
)
def test_a_mask_without_sense_is_refused(weights, mask, message):
    with pytest.raises(ValueError, match=message):
        updates_of(weights.optimizer(weight_decay=0.5, mask=mask))


def test_an_architecture_without_weight_decay_has_no_mask():
    learner = architecture.ARCHITECTURES["sgd"].settings()
    weights = Weights(architecture.build_learner(learner).init(jax.random.key(0)), learner, {}, {})
    with pytest.raises(ValueError, match="learner 'sgd' has no mask; leave it out."):
        weights.optimizer(mask=True)
