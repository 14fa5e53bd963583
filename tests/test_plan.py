"""Plans: arithmetic that loops don't hide, memory from the compiled program, no data needed."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from test_prepared_tasks import write_prepared

from lolo.cli import main as cli
from lolo.files import settings
from lolo.method import meta
from lolo.tasks import models
from lolo.tasks.small import quadratic
from lolo.training import build, cost, plan, recipes
from lolo.trees import count_bytes

F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_products_are_counted_by_shape_precision_and_turns():
    def loop(x, w):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.matmul(x, w, precision="highest"), x)

    found = cost.count(loop, shape(3, 5), shape(5, 5))
    assert found.products == (cost.Product(2.0 * 3 * 5 * 5, 4.0 * (15 + 25 + 15), "float32, highest precision", 7.0),)
    kinds = [
        cost.count(jnp.matmul, shape(2, 2, dtype=dtype), shape(2, 2, dtype=dtype)).products[0].kind
        for dtype in (F32, jnp.bfloat16)
    ]
    assert kinds == ["float32", "bfloat16"]


def test_of_a_condition_the_dearer_branch_counts():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert sum(p.flops for p in cost.count(either, shape(4, 4)).products) == 2 * 2 * 4**3


def test_the_count_is_xlas_own_where_there_are_no_loops():
    def convolutions(x, w, v):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        z = jax.lax.conv_general_dilated(y, v, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(z) ** 2)

    mlp = models.mlp((48, 32, 16))
    params, _ = jax.eval_shape(mlp.init, jax.random.key(0))
    programs = {
        "mlp": (jax.grad(lambda p, x: jnp.sum(mlp.apply(p, {}, x)[0] ** 2)), (params, shape(20, 48))),
        "convolutions": (
            jax.grad(convolutions, argnums=(0, 1, 2)),
            (shape(4, 17, 17, 6), shape(3, 3, 6, 8), shape(3, 3, 8, 8)),
        ),
    }
    for name, (function, arguments) in programs.items():
        theirs = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
        assert cost.count(function, *arguments).flops == pytest.approx(theirs, rel=0.1), name


RECIPE = small(recipes.LOLO, {"estimator.pairs": 2, "validation.every": 0})


@pytest.fixture(scope="module")
def planned():
    return plan.of_training(RECIPE)


def test_a_plans_state_is_that_of_the_run(planned):
    setup = build.build(RECIPE)
    group = (quadratic().train,)
    state = jax.eval_shape(lambda key: meta.meta_init(setup, group, key), jax.random.key(0))
    assert sum(planned.parts.values()) == count_bytes(state)
    # XLA pads nothing here: what goes in is the state.
    assert planned.memory.state == pytest.approx(count_bytes(state), abs=64)
    assert planned.memory.data == planned.memory.held_out / 2 == 1000 * 8 * 4
    assert planned.memory.temporary > 0 and planned.devices == 1 and planned.units == 20


def test_arithmetic_is_that_of_all_inner_steps(planned):
    one = plan.inner_step_cost(build.build(RECIPE), quadratic().train).flops
    assert planned.flops == one * 3 * 4  # L = 3 steps of 2 pairs


def test_validation_has_its_share():
    splits, setup = quadratic(), build.build(RECIPE)
    step = plan.inner_step_cost(setup, splits.train)
    flops, seconds = plan._long_run(step, splits.validation, 300)
    scored = plan.scoring_cost(splits.validation, 1000)
    assert flops == pytest.approx(300 * step.flops + 4 * scored)  # three times on the way, and at the end
    assert seconds >= 0


def test_more_together_take_less_launching():
    found = cost.Cost((cost.Product(1.0, 1.0, "float32", 10.0),), 0.0)
    assert plan.h100_seconds(found) == pytest.approx(plan.LAUNCH_SECONDS)  # ten blocks of one product
    assert plan.h100_seconds(found, together=16) == pytest.approx(plan.LAUNCH_SECONDS / 16)
    large = cost.Cost((cost.Product(67e12, 1.0, "float32, highest precision", 1.0),), 0.0)
    assert plan.h100_seconds(large) == pytest.approx(1 / plan.UTILISATION)


def test_a_report_says_what_does_not_fit_and_what_to_do(planned, monkeypatch):
    text = plan.report(planned)
    assert "fits an 80 GB GPU: yes" in text and "Not measured" in text and "Nothing was run" in text
    huge = planned._replace(memory=planned.memory._replace(temporary=int(200e9)))
    assert "fits an 80 GB GPU: NO; raise the task's micro_batches" in plan.report(huge)
    buffers = planned._replace(memory=planned.memory._replace(state=int(200e9)))
    assert "--offload" in plan.report(buffers)
    monkeypatch.setattr(plan, "available_bytes", lambda: 10)
    assert "fits here: NO" in plan.report(planned)
    monkeypatch.setattr(plan, "available_bytes", lambda: None)
    assert "fits here: unknown" in plan.report(planned)


def test_a_stream_is_planned_with_one_segment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))  # there are no data
    recipe = small(recipes.NAIVE, {"tasks": ("textures-mlp:batch=8,width=4,depth=1,resident_gb=0",)})
    found = plan.of_training(settings.with_field(recipe, "validation.every", 0))
    assert found.memory.data == 3 * 8 * (3072 + 2) and found.streamed
    assert "the set is streamed" in plan.report(found)


def test_dry_run_prints_a_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--task", "quadratic", "--learner.name", "sgd", "--unroll.length", "6", "--unroll.truncation", "3"]
    assert cli.main(["train", "naive", *words, "--validation.every", "0", "--dry-run", "--devices", "1"]) == 0
    out = capsys.readouterr().out
    assert "meta-training on quadratic. Nothing was run." in out and "5,000 of them" in out
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_evaluation_is_planned_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "lolo-small", "--task", "quadratic", "--steps", "200", "--seeds", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "evaluating on quadratic" in out and "per run of 200 steps; 2 of them" in out
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_planned_memory_is_measured_memory(tmp_path, monkeypatch):
    """The MLP at the paper's batch; experiments/plan/measure.py has ResNet-18 and GPT too."""
    rng = np.random.default_rng(0)
    splits = {
        split: {
            "images": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
            "labels": rng.integers(0, 748, n).astype(np.uint16),
        }
        for split, n in {"train": 44_663, "validation": 4_996, "test": 18_407}.items()
    }
    write_prepared(tmp_path, "textures", splits)
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))
    path = Path(__file__).parents[1] / "experiments" / "plan" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    monkeypatch.setattr("sys.argv", ["measure.py", "--only", "mlp", "--out", str(tmp_path / "memory.json")])
    assert measure.main() == 0, (tmp_path / "memory.json").read_text()
