"""The examples train, fit on a page, and the README's Python runs. PyTorch's are in tests/torch."""

import pathlib
import re

import example_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lolo.tasks import by_name

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("path", example_runs.found("optax_*.py"), ids=lambda path: path.stem)
def test_the_loss_falls(path):
    example_runs.assert_trains(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flax_nnx.py", "equinox_module.py", "orbax_checkpoint.py"])
def test_the_loss_falls_with_libraries_of_models(name):
    example_runs.assert_trains(example_runs.FOLDER / name)


def test_examples_have_at_most_forty_lines():
    assert all(len(path.read_text().splitlines()) <= 40 for path in example_runs.found("*.py"))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readme_s_use_block_steps():
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    names = {"params": params, "grads": jax.tree.map(jnp.ones_like, params), "steps": 100}
    code = blocks("README.md")[0]
    updated = code[code.index("updates, state") :]
    exec(f"{code}\n{updated}", names)  # twice: the first step of a warm-up is none
    assert all(
        bool((new != old).all()) for new, old in zip(*map(jax.tree.leaves, (names["params"], params)), strict=True)
    )


def test_the_task_in_the_docs_is_a_whole_file(tmp_path):
    (block,) = [block for block in blocks("docs/add_your_own.md") if "def my_task" in block]
    (tmp_path / "my_task.py").write_text(block)
    splits = by_name.resolve(f"{tmp_path}/my_task.py:my_task")
    params, stats = splits.train.init(jax.random.key(0))
    loss, _ = splits.train.loss(params, stats, splits.train.sample(jax.random.key(1), jnp.int32(0)), jax.random.key(2))
    assert np.isfinite(loss) and splits.test.size == 500
