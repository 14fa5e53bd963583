"""`norm_fc` as the textbooks have it: one [30, *shape] array per parameter, in the plainest form.

Written from the description alone and independent of `lolo.norm_fc`, which is compared with it. `reference=True` gives
what PyLO's CELO2_naive does where ours departs from it: root mean squares and Newton-Schulz over the last two axes,
instead of the whole tensor, and vectors whose weight decay is multiplied by adam_scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS = (0.9, 0.99, 0.999)


def norm_fc(
    phi,
    learning_rate,
    *,
    weight_decay=0.0,
    orthogonal=True,
    baseline="momentum",
    step_rms="one",
    adam_scale=1.0,
    adam_beta2=0.95,
    is_matrix=lambda name, p: p.ndim > 1,
    reference=False,
):
    """Parameters are a flat dict. State: a dict of what each average is so far, and the number of steps."""

    def init(params):
        nothing = dict(m=[0.0] * 3, v=0.0, row=[0.0] * 3, column=[0.0] * 3)
        shapes = {name: accumulate(nothing, jnp.zeros(p.shape), 0.95) for name, p in params.items()}
        return jax.tree.map(jnp.zeros_like, shapes), jnp.int32(0)

    def update(grads, state, params):
        old, count = state
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        new, updates = {}, {}
        for name, param in params.items():
            g, p = grads[name].astype(jnp.float32), param.astype(jnp.float32)
            beta2 = 0.95 if is_matrix(name, p) else adam_beta2
            new[name] = moments = accumulate(old[name], g, beta2)
            decay = weight_decay
            mean, square = moments["m"][0] / (1 - 0.9 ** (count + 1)), moments["v"] / (1 - beta2 ** (count + 1))
            adam = mean / (jnp.sqrt(square) + 1e-8)
            if is_matrix(name, p):
                step = direction(phi, g, p, moments, baseline, window(g) if reference else None)
                if orthogonal and g.ndim > 1:
                    step = orthogonalize(step, batched=reference)
                step = normalize(step * (moments["v"] > 0), window(g) if reference else None)
                step = step * jnp.sqrt(jnp.mean(adam * adam)) if step_rms == "adam" else step
            else:
                step = adam_scale * adam
                decay = decay * (adam_scale if reference else 1.0)
            updates[name] = (-rate * (step + decay * p)).astype(param.dtype)
        return updates, (new, count + 1)

    return optax.GradientTransformation(init, update)


def window(x):
    return tuple(range(x.ndim))[-2:]


def factored_axes(shape):
    """(largest, second largest); among equals the later is the larger. None below two axes."""
    order = np.argsort(shape, kind="stable")
    return (int(order[-1]), int(order[-2])) if len(shape) > 1 else None


def accumulate(old, g, beta2):
    axes, floored = factored_axes(g.shape), g * g + 1e-30
    means = (floored, floored) if axes is None else [floored.mean(axis, keepdims=True) for axis in axes]
    average = lambda olds, new: [d * x + (1 - d) * new for d, x in zip(DECAYS, olds, strict=True)]  # noqa: E731
    return {
        "m": average(old["m"], g),
        "v": beta2 * old["v"] + (1 - beta2) * g * g,
        "row": average(old["row"], means[0]),
        "column": average(old["column"], means[1]),
    }


def normalize(x, axes=None):
    return x * jax.lax.rsqrt(1e-9 + jnp.mean(x * x, axis=axes, keepdims=True))


def floored_rsqrt(x):
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))


def inputs(g, p, moments):
    """[30, *shape]; below two axes [15, *shape]."""
    m, v, row, column = (moments[name] for name in ("m", "v", "row", "column"))
    root, axes = jax.lax.rsqrt(v + 1e-8), factored_axes(g.shape)
    if axes is None:
        factors = [floored_rsqrt(f + 1e-9) for f in row]
    else:
        means = [r.mean(axes[1], keepdims=True) for r in row]
        factors = [
            floored_rsqrt(r / (mean + 1e-9)) * floored_rsqrt(c) for r, mean, c in zip(row, means, column, strict=True)
        ]
    x = [g, jnp.clip(g, -0.1, 0.1), p, *m, v, *(y * root for y in m), root, *(g * f for f in factors), g * root]
    if axes is not None:
        x += [*row, *column, *(jax.lax.rsqrt(y + 1e-8) for y in row), *(jax.lax.rsqrt(y + 1e-8) for y in column)]
        x += [y * f for y, f in zip(m, factors, strict=True)]
    return [jnp.broadcast_to(y, g.shape) for y in x]


def direction(phi, g, p, moments, baseline, axes):
    x = jnp.stack([normalize(y, axes) for y in inputs(g, p, moments)], axis=-1)
    h = jax.nn.relu(x @ phi["w0"][: x.shape[-1]] + phi["b0"])
    h = jax.nn.relu(h @ phi["w1"] + phi["b1"])
    out = (h @ phi["w2"] + phi["b2"])[..., 0]
    if baseline == "momentum":
        nesterov = 0.1 * g + 0.9 * moments["m"][0]
        out = out + nesterov * jax.lax.rsqrt(1e-30 + jnp.mean(nesterov**2))
    return out


def orthogonalize(d, batched=False):
    """Newton-Schulz on the matrix [all other axes, last axis], or on every matrix of the last two axes."""
    x = d if batched else d.reshape(-1, d.shape[-1])
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (jnp.swapaxes(x, -1, -2) if tall else x).reshape(d.shape)
