"""What `test_sharding.py` runs of `norm_fc` in a process of its own, with four CPU devices."""

import sharded  # isort: skip  (first: it says how many devices there are)

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from sharded import P, put, specs, steps, tree

from lolo.optimizers.norm_fc import norm_fc

PHI = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), norm_fc().init(jax.random.key(0)))


def make(**settings):
    return norm_fc(learning_rate=0.01, weight_decay=0.1, **settings).optimizer(PHI)


def assert_equal(ours, reference):
    """Newton-Schulz multiplies small singular values, and with them the rounding of sums in another order."""
    sharded.assert_equal(ours, reference, rtol=1e-3, atol=1e-5)


def under_jit(kind, start, reference):
    mesh, optimizer = sharded.mesh_of(kind), make()
    with jax.set_mesh(mesh):
        params = put(start, mesh, specs(0))
        state = optimizer.init(params)
        assert state.momentum["largest"].sharding.spec == P(None, "x", None)
        run = jax.jit(lambda params, state: steps(optimizer, params, state))
        assert_equal(run(params, state), reference)


def inside_shard_map(axis, start, reference, **settings):
    mesh, places = sharded.mesh_of(AxisType.Explicit), specs(axis)
    optimizer = make(axis_name="x", sharded_axis=axis, **settings)

    def run(params):
        return steps(optimizer, params, optimizer.init(params))[0]

    whole = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(places,), out_specs=places))
    compiled = whole.lower(put(start, mesh, places)).compile()
    assert_equal(compiled(put(start, mesh, places)), reference[0])
    return "all-gather" in compiled.as_text()


def refusals():
    def run(params):
        return make().update(params, make(axis_name="x").init(params), params)[0]

    run = jax.shard_map(run, mesh=sharded.mesh_of(AxisType.Auto), in_specs=P("x"), out_specs=P("x"))
    try:
        jax.eval_shape(run, {"w": jnp.ones((8, 4))})
    except ValueError as error:
        assert "pass axis_name='x'" in str(error), error
    else:
        raise AssertionError("a part passed for a whole tensor")


def main():
    assert len(jax.devices()) == 4
    refusals()
    start = tree(0)
    for orthogonal in (True, False):
        optimizer = make(orthogonal=orthogonal)
        reference = jax.jit(lambda params, optimizer=optimizer: steps(optimizer, params, optimizer.init(params)))(start)
        gathered = inside_shard_map(0, start, reference, orthogonal=orthogonal)
        assert gathered == orthogonal, "only Newton-Schulz puts tensors together"
        sized = make(orthogonal=orthogonal, step_rms="adam")
        of_adam = jax.jit(lambda params, optimizer=sized: steps(optimizer, params, optimizer.init(params)))(start)
        inside_shard_map(0, start, of_adam, orthogonal=orthogonal, step_rms="adam")
        if orthogonal:
            inside_shard_map(-1, start, reference)
            for kind in (AxisType.Auto, AxisType.Explicit):
                under_jit(kind, start, reference)
    print("all passed")


if __name__ == "__main__":
    main()
