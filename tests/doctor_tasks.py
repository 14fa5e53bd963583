"""Inner problems that can't be meta-trained on, for `test_doctor_verdicts`: a quadratic with a mistake in its loss."""

import dataclasses

import jax
import jax.numpy as jnp

from lolo.tasks import quadratic


def with_loss(change):
    """The quadratic with `change` of its training loss; the other splits stay right."""
    splits = quadratic()
    return splits._replace(train=dataclasses.replace(splits.train, loss=change(splits.train.loss)))


def wrong_sign():
    """Training climbs the loss, and diverges."""
    return with_loss(lambda loss: lambda *given: (-loss(*given)[0], {}))


def unconnected():
    """The loss does not depend on the parameters."""
    return with_loss(lambda loss: lambda params, *rest: loss({"x": 0 * params["x"]}, *rest))


def drowned():
    """Gradients are noise, 240 times the signal."""

    def noisy(loss):
        def noisy_loss(params, stats, batch, key):
            slope = 30.0 * jax.random.normal(key, params["x"].shape)
            return loss(params, stats, batch, key)[0] + jnp.dot(slope, params["x"]), stats

        return noisy_loss

    return with_loss(noisy)
