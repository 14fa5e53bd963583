"""What documentation and docstrings name is there: modules, their names, files, and tests.

Names are read from sources, so nothing is imported.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "studies").glob("*.md"))]
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SOURCES = sorted((ROOT / "lolo").rglob("*.py"))
NAME = re.compile(r"(?<![\w/.])lolo(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w/.])lolo/[\w/]+(?:\.\w+)?")
TEST = re.compile(r"(?:torch/)?(test_\w+\.py)(?:::(\w+…?))?")


def top_level(file):
    """Names that a module defines or imports."""
    body = ast.parse(file.read_text()).body
    for node in [*body, *(inner for tried in body if isinstance(tried, ast.Try) for inner in tried.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        else:
            yield from (x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))


def lazy_names():
    """What `lolo` itself offers: the keys of its table."""
    tree = ast.parse((ROOT / "lolo" / "__init__.py").read_text())
    return {key.value for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}


def is_there(name):
    """Whether "lolo.files.disk.FileError" is a module of the package, a name in one, or one of its lazy names.

    What comes after such a name, a method or a field, is not looked at.
    """
    _, *parts = name.split(".")
    folder = ROOT / "lolo"
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if not parts or (folder == ROOT / "lolo" and parts[0] in lazy_names()):
        return True
    file = folder / f"{parts[0]}.py"
    if not file.is_file():
        return parts[0] in top_level(folder / "__init__.py")
    return len(parts) == 1 or parts[1] in top_level(file)


def missing_in(text):
    """Names of modules and paths of files in a text that are not there."""
    names = [name for name in NAME.findall(text) if not is_there(name)]
    return names + [path for path in PATH.findall(text) if not (ROOT / path).exists()]


def missing_tests(text):
    """Tests that a text names and no file has; `…` stands for the rest of a name."""
    for file, name in TEST.findall(text):
        path = next((ROOT / "tests").rglob(file), None)
        names = [] if path is None else top_level(path)
        start = name.removesuffix("…")
        if path is None or (name and not any(x == name or (start != name and x.startswith(start)) for x in names)):
            yield f"{file}::{name}" if name else file


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_and_files_that_are_named_are_there(file):
    assert missing_in(file.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_that_are_named_are_there(page):
    assert list(missing_tests(page.read_text())) == []


def test_a_name_that_is_not_there_is_noticed():
    assert missing_in("`lolo.cost`, `lolo.training.cost.gone`") == ["lolo.cost", "lolo.training.cost.gone"]
    assert missing_in("see `lolo/textbook.py`.") == ["lolo/textbook.py"]
    assert missing_in("`lolo.train`, `lolo.files.disk.FileError`, `lolo.tasks.resolve`, `lolo/bench/textbook.py`") == []
    assert list(missing_tests("`test_gone.py`, `test_kill.py::test_gone`")) == [
        "test_gone.py",
        "test_kill.py::test_gone",
    ]
    assert list(missing_tests("`test_kill.py::test_twe…`, `test_kill.py::test_gone…`")) == ["test_kill.py::test_gone…"]
