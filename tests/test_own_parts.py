"""A researcher's own optimizer, expert, loss, estimator, schedule and task, in files outside the package."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lolo
from lolo.cli.main import main
from lolo.files import settings, tensors, user_code
from lolo.optimizers import architecture, pretrained
from lolo.race import entrants
from lolo.studies import candidates
from lolo.training import build, own_parts, recipes, run_folder

PARTS = '''
import jax
import jax.numpy as jnp
import optax

import lolo
from helper_of_mine import START
from lolo.method.imitation import ImitationLoss


def rate(start=START):
    """SGD with a learned rate."""
    def init(key):
        return {"log_rate": jnp.full((1,), jnp.log(start))}

    def optimizer(meta_params):
        return optax.sgd(jnp.exp(meta_params["log_rate"][0]))

    return lolo.LearnedOptimizer(init, optimizer)


def expert(rate, momentum=0.5):
    return optax.sgd(rate, momentum=momentum)


def loss(magnitude):
    def distance(learned, by_hand):
        differences = jax.tree.map(lambda a, b: jnp.sum(jnp.abs(a - b)), learned, by_hand)
        return sum(jax.tree.leaves(differences))

    return ImitationLoss(distance, weights=1.0)


def estimator(sigma, pairs):
    from lolo.method import estimators

    return estimators.ESTIMATORS["es"](sigma, pairs)


def late(step, total, start, end, share=0.5):
    return jnp.where(step < share * total, 0.0, 1.0)


def falling(lr, final, steps):
    return optax.linear_schedule(lr, final, steps)


def short(key, step):
    return jnp.int32(1)


def nothing():
    return 3


def later():
    """Imports its neighbour when it is called."""
    import helper_of_mine

    return rate(helper_of_mine.START)


def optimizer(rate):
    return optax.sgd(rate)


def of(values, step=lambda meta_params: optax.sgd(0.1)):
    return lolo.LearnedOptimizer(lambda key: values, step)


def whole():
    return of({"a": jnp.zeros(1, jnp.int32)})


def numbered():
    return of({0: jnp.zeros(1)})


def reserved():
    return of({"__metadata__": jnp.zeros(1)})


def empty():
    return of({"a": jnp.zeros((0, 3))})


def large():
    return lolo.LearnedOptimizer(lambda key: {"a": jnp.zeros(16_000_001)}, lambda meta_params: optax.sgd(0.1))


def still():
    return of({"a": jnp.zeros(1)}, lambda meta_params: None)


def half(key, step):
    return jnp.float32(0.5)


def each(magnitude):
    return ImitationLoss(lambda learned, by_hand: learned, weights=1.0)
'''
TASK = "from lolo.tasks.small import quadratic\n\n\ndef mine(dimensions=3):\n    return quadratic(dimensions)\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with the user's files, which is the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    (folder / "helper_of_mine.py").write_text("START = 0.05\n")
    (folder / "task.py").write_text(TASK)
    monkeypatch.chdir(folder)
    yield folder
    for name in ("parts", "helper_of_mine"):  # some tests import them, as a researcher's own script does
        sys.modules.pop(name, None)


SMALL = ["--unroll.length", "20", "--unroll.truncation", "10", "--estimator.pairs", "2", "--validation.every", "0"]
OWN = {
    "learner.name": "parts.py:rate:start=0.02",
    "imitation.expert": "parts.py:expert:momentum=0.9",
    "imitation.loss": "parts.py:loss",
    "imitation.alpha_loss": "parts.py:late:share=0.25",
    "imitation.schedule": "parts.py:falling",
    "estimator.kind": "parts.py:estimator",
    "unroll.schedule": "parts.py:short",
}


def forget_all():
    """As in a new process."""
    user_code._LOADED.clear()
    architecture._OWN.clear()
    architecture._built.cache_clear()


def words(**changes):
    return [word for name, value in (OWN | changes).items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_a_researcher_s_walk(files, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train = ["train", "lolo", "--task", "task.py:mine", *words(), *SMALL, "--out", str(run)]
    assert main([*train, "--outer.steps", "6"]) == 0
    recipe = run_folder.read_recipe(run)
    values = settings.fields(recipe)
    assert all(len(values[name].partition("@")[2]) == 64 for name in OWN)

    # Stopped after 3 of 6, as a full disk would, and resumed from another folder: the same bytes.
    half = tmp_path / "half"
    shutil.copytree(run, half)
    kept = run_folder.checkpoints(half)
    assert kept[0] == 0
    for step in kept[1:]:
        shutil.rmtree(run_folder.checkpoint_folder(half, step))
    for name in ("last.safetensors", "log.jsonl"):
        (half / name).unlink()
    (half / "log.jsonl").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["resume", str(half)]) == 0
    first, second = (tensors.unpack((one / "last.safetensors").read_bytes(), "weights") for one in (run, half))
    assert tensors.digest(first[0]) == tensors.digest(second[0])

    assert main(["doctor", str(run)]) in (0, 7, 8)
    last = str(run / "last.safetensors")
    forget_all()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["doctor", str(run), "--no-evaluate"]) == 8

    # Weights name their code, and nobody runs it unless asked to.
    capsys.readouterr()
    compare = ["eval", last, "adamw:1e-2", "--task", "quadratic", "--steps", "100", "--seeds", "2"]
    forget_all()
    assert main(compare) == 2
    assert "parts.py:rate" in (error := capsys.readouterr().err) and "--code" in error and "sha256" in error
    with pytest.raises(ValueError, match="code=function"):
        lolo.load(last)
    assert main([*compare, "--code", str(files / "parts.py")]) == 0
    assert "adamw 0.01" in capsys.readouterr().out

    # In optax, as the caller's own function.
    monkeypatch.syspath_prepend(str(files))
    import parts

    entrant = entrants.entrant(str(last), code=(files / "parts.py",))
    assert entrant.meta_tasks and candidates.read(entrant.optimizers, code=entrant.code)
    optimizer = lolo.load(last, code=parts.rate).optimizer()
    params = {"w": jnp.ones(3)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    phi = lolo.load(last).meta_params["log_rate"]
    np.testing.assert_allclose(updates["w"], -np.exp(phi[0]) * np.ones(3), rtol=1e-6)
    assert phi[0] != np.log(np.float32(0.02))  # meta-training has moved it

    # A changed file is refused by name.
    (files / "parts.py").write_text(PARTS + "\n# changed\n")
    forget_all()
    assert main([*compare, "--code", str(files / "parts.py")]) == 2
    assert "parts.py has changed" in capsys.readouterr().err
    assert main(["resume", str(half)]) == 2
    assert "parts.py has changed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has changed since the meta-training"):
        lolo.load(last, code=parts.rate)


def test_own_parts_are_what_is_built(files):
    recipe = recipes.LOLO
    for name, value in OWN.items():
        recipe = settings.with_field(recipe, name, value)
    setup = build.build(own_parts.load(recipe))
    np.testing.assert_allclose(setup.learned.init(jax.random.key(0))["log_rate"], np.log([0.02]), rtol=1e-6)
    assert [float(setup.alpha_loss(step)) for step in (0, 1249, 1250)] == [0, 0, 1]
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, -2.0])}
    ours, theirs = setup.expert, optax.sgd(1e-3, momentum=0.9)
    step, _ = ours.update(grads, ours.init(params), params, learner_state=None)
    np.testing.assert_allclose(step["w"], theirs.update(grads, theirs.init(params))[0]["w"], rtol=1e-6)
    assert int(setup.draw_length(jax.random.key(0), 3)) == 1
    assert float(setup.imitation_loss.parts(params, grads)) == 3
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learner.name", "parts.py:nothing", "returned int; expected lolo.LearnedOptimizer"),
        ("learner.name", "parts.py:none", "no function 'none'"),
        ("learner.name", "parts.py:rate:width=3", "'width=3' is no setting of 'rate'"),
        ("learner.name", "parts.py:rate:start=x", "must be a number"),
        ("imitation.expert", "other.py:expert", "other.py does not exist"),
        ("imitation.expert", "parts.py:expert@" + 64 * "0", "has changed"),
        ("learner.name", "rate", "path.py:function"),
        ("learner.name", "parts.py:nothing:width=3", "'width=3' is no setting of 'nothing', which has none"),
        ("learner.name", "parts.py:optimizer", "parts.py:optimizer failed with TypeError"),
        ("learner.name", "parts.py:whole", "array 'a' of its φ is int32[1]; expected float32"),
        ("learner.name", "parts.py:numbered", "its φ has an array 0"),
        ("learner.name", "parts.py:reserved", "its φ has an array '__metadata__'"),
        ("learner.name", "parts.py:empty", "float32[0, 3]; expected float32 numbers"),
        ("learner.name", "parts.py:large", "16,000,001 numbers; a weights file holds at most 16,000,000"),
        ("learner.name", "parts.py:still", "its optimizer is NoneType; expected an optax optimizer"),
        ("imitation.expert", "parts.py:nothing", "parts.py:nothing failed with TypeError"),
        ("imitation.expert", "parts.py:loss", "returned ImitationLoss; expected an optax optimizer"),
        ("imitation.loss", "parts.py:optimizer", "expected an imitation loss"),
        ("imitation.loss", "parts.py:each", "a step with parts.py:each failed with"),
        ("imitation.alpha_mix", "parts.py:nothing", "parts.py:nothing failed with TypeError"),
        ("unroll.schedule", "parts.py:half", "returned float32[]; expected a whole number of truncations"),
        ("estimator.kind", "parts.py:short", "returned int32[]; expected a lolo.Estimator"),
        ("replay.push", "parts.py:short", "did you mean 'random'?"),
    ],
)
def test_what_can_t_be_a_part_is_refused_in_one_line(files, field, value, message, capsys, tmp_path):
    words = ["train", "lolo", "--task", "quadratic", f"--{field}", value, "--out", str(tmp_path / "run")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def rate_of(name):
    """φ's rate of a learner of a user's, as a run would draw it."""
    setup = build.build(own_parts.load(settings.with_field(recipes.LOLO, "learner.name", name)))
    return round(float(jnp.exp(setup.learned.init(jax.random.key(0))["log_rate"][0])), 3)


def test_a_function_may_import_its_neighbour_when_it_is_called(files):
    assert rate_of("parts.py:later") == 0.05


def test_equal_files_in_two_folders_have_their_own_neighbours(files):
    for folder, start in {"one": 0.1, "two": 0.2}.items():
        (files / folder).mkdir()
        shutil.copy(files / "parts.py", files / folder)
        (files / folder / "helper_of_mine.py").write_text(f"START = {start}\n")
    names = ["one/parts.py:rate", "two/parts.py:rate", "parts.py:rate", "one/parts.py:rate"]
    assert [rate_of(name) for name in names] == [0.1, 0.2, 0.05, 0.1]
    (files / "helper_of_mine.py").write_text("START = 0.123\n")  # as in a notebook: the file is read anew
    assert rate_of("parts.py:rate") == 0.123


def test_a_recipe_is_checked_without_running_its_code(files):
    recipe = own_parts.load(settings.with_field(recipes.LOLO, "learner.name", "parts.py:rate"))
    forget_all()
    (files / "parts.py").unlink()
    build.check(recipe)


@pytest.fixture
def kept(files):
    """Weights of `rate`, in a process that has not seen its code."""
    recipe = own_parts.load(settings.with_field(recipes.LOLO, "learner.name", "parts.py:rate"))
    about = recipes.to_dict(recipe)
    pretrained.save(files / "w.safetensors", pretrained.Weights({"log_rate": jnp.zeros(1)}, recipe.learner, about, {}))
    forget_all()
    return files / "w.safetensors"


def one_step(weights):
    optimizer, params = weights.optimizer(), {"w": jnp.ones(1)}
    return float(optimizer.update(params, optimizer.init(params), params)[0]["w"][0])


def times(factor):
    """A learner as a cell of a notebook defines it, without a file."""
    code = "def rate(): return lolo.LearnedOptimizer(init, lambda p: optax.sgd(factor * jnp.exp(p['log_rate'][0])))"
    names = {"lolo": lolo, "optax": optax, "jnp": jnp, "factor": factor, "init": lambda key: {"log_rate": jnp.zeros(1)}}
    exec(code, names)
    return names["rate"]


def test_the_function_that_is_given_is_the_one_that_runs(kept):
    assert one_step(lolo.load(kept, code=times(1))) == -1
    assert one_step(lolo.load(kept, code=times(3))) == -3  # a cell that was changed and run again
    assert repr(lolo.load(kept, code=times(3))).startswith("Weights(parts.py:rate, 1 numbers, ")
    forget_all()
    with pytest.raises(ValueError, match="parts.py:rate returned int"):
        lolo.load(kept, code=eval("lambda: 3"))  # without a file
    with pytest.raises(ValueError, match="code=function"):  # what failed is not taken the next time
        lolo.load(kept)
    with pytest.raises(ValueError, match="code='parts.py' is no function; give the one that parts.py:rate names"):
        pretrained.check_code("parts.py:rate@" + 64 * "0", "parts.py", "w")


def test_a_decorated_function_is_known_by_its_own_file(kept, files, monkeypatch):
    (files / "decorators_of_mine.py").write_text(
        "import functools\n\n\ndef same(function):\n"
        "    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))\n"
    )
    monkeypatch.syspath_prepend(str(files))
    import decorators_of_mine

    namespace = {"__name__": "parts_of_mine"}
    exec(compile((files / "parts.py").read_text(), str(files / "parts.py"), "exec"), namespace)
    assert one_step(lolo.load(kept, code=decorators_of_mine.same(namespace["rate"]))) == -1


def test_the_file_that_may_be_run_is_known_by_its_sha256(kept, files):
    shutil.copy(files / "parts.py", files / "another_name.py")
    shutil.copy(files / "helper_of_mine.py", files / "sub.py")
    read = lambda *code: candidates.read([kept], code=code)  # noqa: E731
    for message, name in (("none.py does not exist", "none.py"), ("--code sub.py is another", "sub.py")):
        with pytest.raises(ValueError, match=message):
            read(files / name if name == "none.py" else type(files)(name))
    assert len(read(files / "sub.py", files / "another_name.py")) == 1
    forget_all()
    (files / "parts.py").write_text("")
    with pytest.raises(ValueError, match="parts.py has changed"):
        read(files / "parts.py")
