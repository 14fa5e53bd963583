"""The examples in docstrings run, and every public name has one. The page docs/api.md shows them."""

import doctest
import importlib
import inspect
import pathlib
import re

import pytest

import lolo
import lolo.interop
from lolo import models, tasks
from lolo.data import embedded, prepare

ROOT = pathlib.Path(__file__).parent.parent
SLOW = {"lolo.notebook", "lolo.training.how", "lolo.training.loop"}  # they meta-train
FINDER = doctest.DocTestFinder(exclude_empty=True)


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def marks(name):
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.torch] * name.startswith("lolo.torch")


def modules_with_examples():
    files = (file for file in sorted((ROOT / "lolo").rglob("*.py")) if ">>> " in file.read_text())
    return [pytest.param(name, marks=marks(name)) for name in map(module_of, files)]


def public():
    """Every public name with what it is: `lolo`, what its pages tell users to import, and constants."""
    yield from ((f"lolo.{name}", getattr(lolo, name)) for name in lolo.__all__)
    for module in (models, tasks, lolo.interop, importlib.import_module("lolo.data")):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)
    for module, names in ((prepare, "prepare open_prepared list_prepared verify"), (embedded, "fashion_mnist books")):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in names.split())


PUBLIC = dict(public())


def imports():
    """The names that the page of the API says its examples start from."""
    names = {}
    exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[0], names)
    return names


def examples_of(thing):
    """The lines of code in a docstring."""
    return [example.source for example in doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    private = name not in {getattr(thing, "__module__", "") for thing in PUBLIC.values()}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in FINDER.find(module, globs={**(vars(module) if private else {}), **imports()}):
        runner.run(test)
    assert runner.failures == 0 and runner.tries > 0


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if callable(thing)])
def test_every_public_function_and_class_has_an_example_that_uses_it(name):
    word = name.rpartition(".")[2]
    assert any(re.search(rf"\b{word}\b", line) for line in examples_of(PUBLIC[name])), f"{name} has no example"


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if not callable(thing)])
def test_every_public_constant_is_in_an_example(name):
    word = name.rpartition(".")[2]
    lines = [line for thing in PUBLIC.values() if callable(thing) for line in examples_of(thing)]
    assert any(re.search(rf"\b{word}\b", line) for line in lines), f"no example has {name}"


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"(?:auto\w+|py:data):: (?:[\w.]+\.)?(\w+)", page))
    assert {name.rpartition(".")[2] for name in PUBLIC} | {"LoLO"} <= documented
