"""What `test_sharding.py` runs in a process of its own, with four CPU devices: python tests/sharded.py"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lolo

WEIGHTS = lolo.load("lolo-small")
# Cut along the first axis: the largest, the second largest, neither; one whose part has another largest axis than the
# whole; a tie; a vector; one that is worked on in blocks. And some that stay whole.
SHAPES = {
    "largest": (64, 24), "second": (24, 64), "neither": (4, 8, 24), "part turns": (40, 24), "tie": (16, 16),
    "vector": (12,), "blocks": (128, 96), "whole": (6, 5), "scalar": (),
}  # fmt: skip
WHOLE = {"whole", "scalar"}


def tree(seed):
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {name: jax.random.normal(keys[name], shape) for name, shape in SHAPES.items()}


def steps(optimizer, params, state, count=3):
    """The state is carried by a scan: its types must stay what they are."""

    def step(carry, scale):
        params, state = carry
        # A gradient that is cut where the parameter is.
        grads = jax.tree.map(lambda p: scale * jnp.sin(3 * p), params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.linspace(0.5, 2.0, count))[0]


def specs(axis):
    return {
        name: P() if name in WHOLE else P(*("x" if i == axis % len(shape) else None for i in range(len(shape))))
        for name, shape in SHAPES.items()
    }


def put(values, mesh, places):
    return {key: jax.device_put(x, NamedSharding(mesh, places[key])) for key, x in values.items()}


def mesh_of(kind):
    return jax.make_mesh((4,), ("x",), axis_types=(kind,))


def assert_equal(ours, reference, rtol=3e-6, atol=5e-7):
    """Moved parameters, then all moments."""
    for path, a in jax.tree_util.tree_leaves_with_path(ours):
        b = dict(jax.tree_util.tree_leaves_with_path(reference))[path]
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol, err_msg=str(path))


def under_jit(kind, start, reference):
    """Parameters sharded, the state beside them; nothing is said to the optimizer."""
    optimizer, mesh = WEIGHTS.optimizer(), mesh_of(kind)
    with jax.set_mesh(mesh):
        params = put(start, mesh, specs(0))
        state = optimizer.init(params)
        momentum, _, row, column = (moment["largest"].sharding.spec for moment in state.moments)
        assert momentum == P(None, "x", None), momentum
        assert not any(row), row  # a mean along the axis that is cut
        assert column == P(None, "x"), column
        run = jax.jit(lambda params, state: steps(optimizer, params, state))
        assert_equal(run(params, state), reference)


def inside_shard_map(start, reference):
    """Parts along the first axis equal the whole, and no tensor is put together."""
    mesh, places, optimizer = mesh_of(AxisType.Explicit), specs(0), WEIGHTS.optimizer(axis_name="x")

    def run(params):
        return steps(optimizer, params, optimizer.init(params))[0]

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(places,), out_specs=places))
    params = put(start, mesh, places)
    compiled = sharded.lower(params).compile()
    assert_equal(compiled(params), reference[0])
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()


def state_from_outside(start, reference):
    """Parts along the last axis. The state of the whole tensors is cut as its own sharding says."""
    mesh, optimizer = mesh_of(AxisType.Explicit), WEIGHTS.optimizer(axis_name="x", sharded_axis=-1)
    params = put(start, mesh, specs(-1))
    state = optimizer.init(params)
    places = jax.tree.map(lambda x: getattr(x.sharding, "spec", P()), (params, state))
    run = jax.shard_map(lambda *args: steps(optimizer, *args), mesh=mesh, in_specs=places, out_specs=places)
    assert_equal(jax.jit(run)(params, state), reference)


def parts_taken_for_whole(start, reference):
    """What the means over all parts are for: without them the result is another one."""
    mesh, places, optimizer = mesh_of(AxisType.Auto), specs(0), WEIGHTS.optimizer()
    names = ("vector", "part turns")

    def run(params):
        return steps(optimizer, params, optimizer.init(params))[0]

    params = {name: start[name] for name in names}
    places = {name: places[name] for name in names}
    wrong = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(places,), out_specs=places, check_vma=False))(params)
    for name in names:
        try:
            assert_equal({name: wrong[name]}, {name: reference[0][name]})
        except AssertionError:
            continue
        raise AssertionError(f"{name}: the comparison can't tell partial means from whole ones")


def error_of(optimizer, spec, check_vma=True, grads=lambda params: params):
    """The message of the ValueError of one step on a matrix [8, 4] that is placed by `spec`; "" if there is none."""

    def run(params):
        state = (optimizer if not check_vma else WEIGHTS.optimizer(axis_name="x")).init(params)
        return optimizer.update(grads(params), state, params)[0]

    try:
        run = jax.shard_map(run, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec, check_vma=check_vma)
        jax.eval_shape(run, {"w": jnp.ones((8, 4))})
    except ValueError as error:
        return str(error)
    return ""


def refusals():
    plain, named = WEIGHTS.optimizer(), WEIGHTS.optimizer(axis_name="x")
    message = error_of(plain, P("x"))
    assert "params['w'] of shape (2, 4)" in message and "pass axis_name='x'" in message, message
    message = error_of(plain, P(), grads=lambda params: {"w": params["w"] * jax.lax.axis_index("x")})
    assert "the gradient of params['w']" in message and "jax.lax.pmean(grads, 'x')" in message, message
    message = error_of(named, P("x"), check_vma=False)
    assert "axis_name='x' needs jax.shard_map(..., check_vma=True)" in message, message
    message = error_of(WEIGHTS.optimizer(axis_name="x", sharded_axis=2), P("x"))
    assert "sharded_axis=2" in message and "(2, 4)" in message, message
    # Equal parameters need no name; nor do devices with a model each, which is what meta-training does.
    assert error_of(plain, P()) == error_of(plain, P("x"), check_vma=False) == error_of(named, P("x")) == ""


def main():
    assert len(jax.devices()) == 4
    refusals()
    start, optimizer = tree(0), WEIGHTS.optimizer()
    reference = jax.jit(lambda params: steps(optimizer, params, optimizer.init(params)))(start)
    for kind in (AxisType.Auto, AxisType.Explicit):
        under_jit(kind, start, reference)
    inside_shard_map(start, reference)
    state_from_outside(start, reference)
    parts_taken_for_whole(start, reference)
    print("all passed")


if __name__ == "__main__":
    main()
