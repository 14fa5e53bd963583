"""One name, one thing: what a class of the package is called, nothing else in it is called."""

import ast
import pathlib
from collections import Counter

import lolo

PACKAGE = pathlib.Path(lolo.__file__).parent
FILES = {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(PACKAGE.rglob("*.py"))}


def shared_class_names(files):
    """Names of classes that are also the name of another class, or of what another line at a file's top defines."""
    trees = [ast.parse(text) for text in files.values()]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assigned = [
        name.id
        for tree in trees
        for line in tree.body
        if isinstance(line, ast.Assign | ast.AnnAssign)
        for name in ast.walk(line)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    ]
    return sorted({name for name, times in Counter(classes).items() if times > 1} | set(classes) & set(assigned))


def test_no_two_classes_share_a_name():
    assert shared_class_names(FILES) == []


def test_a_shared_name_is_noticed():
    assert shared_class_names({"a.py": "class Losses: ...", "b.py": "class Losses: ..."}) == ["Losses"]
    assert shared_class_names({"a.py": "class Tensor: ...", "b.py": "Tensor = tuple[int, int]"}) == ["Tensor"]
    assert shared_class_names({"a.py": "class Losses: ...", "b.py": "class TrialLosses: ..."}) == []
