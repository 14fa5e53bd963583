"""Folders import in one direction; what users load is light; files stay short."""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lolo"
ORDER = re.findall(r"^\| `lolo/(\w+)[/.]", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
NOTEBOOK = {"cli", "evaluation", "files", "method", "optimizers", "studies", "tasks", "training"}
FACES = {"__init__": set(), "models": {"tasks"}, "interop": {"optimizers"}, "notebook": NOTEBOOK}
"""Files that hand names on, under the paths that users import, and the folders that each imports from."""
ONLY = {
    "optimizers": {"trees", "files", "kernels"},
    "torch": {"files", "kernels", "optimizers"},
    "method": {"trees", "optimizers"},
}
"""Folders that import from these alone, not from all that come before them."""
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 420  # lines of a file; Algorithm 1 is read in one piece
WHOLE = {"method/meta.py"}


def place(module):
    """Folder and file of "lolo.files.disk": ("files", "disk")."""
    parts = module.split(".")[1:]
    return parts[0], ".".join(parts[1:])


def is_ours(module):
    return module.split(".")[0] == "lolo"


def imported(source):
    """Modules of lolo that a source imports, anywhere in it: "lolo.files.disk", or "lolo.files" for a name of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            for alias in node.names:
                inner = PACKAGE / pathlib.Path(*node.module.split(".")[1:], alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))


def name_of(file):
    """The module of a file: "lolo.files.disk", or "lolo.files" for its __init__.py."""
    parts = ("lolo", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def against_the_order(file, source):
    """Modules that a file must not import."""
    folder = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    before = FACES[folder] if folder in FACES else ONLY.get(folder, set(ORDER[: ORDER.index(folder)])) | {folder}
    return [module for module in imported(source) if module == "lolo" or place(module)[0] not in before]


def unclear_imports(file, source):
    """Imports in a form whose module can't be read from the line, or that loads more names than it says."""
    for node in ast.walk(ast.parse(source)):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        # After `import lolo.trees` every public name of `lolo` is at hand, and looked up without an import.
        unnamed = isinstance(node, ast.Import) and any(is_ours(x.name) and x.asname is None for x in node.names)
        if relative or unnamed or (file != PACKAGE / "__init__.py" and is_dynamic_import(node)):
            yield ast.unparse(node)


def is_dynamic_import(node):
    """Whether a node is `import_module` or `__import__` of a name of lolo, or of one that is relative."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in ("import_module", "__import__"):
        return False
    texts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return any(text.startswith(("lolo", ".")) for text in texts)


def hidden_imports(source):
    """Imports from lolo in a function."""
    outer = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [module for function in outer for module in imported(ast.unparse(function))]


def cycle(sources):
    """Modules that import each other in a circle, or are needed by such: of a dict, module -> source."""
    left = {module: set(imported(source)) - {module} for module, source in sources.items()}
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        left = {module: needs for module, needs in left.items() if module not in free}
    return sorted(left)


def test_every_folder_is_in_the_list():
    folders = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(ORDER) == folders - set(FACES) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_from_its_folder_and_from_folders_before_it(file):
    source = file.read_text()
    assert against_the_order(file, source) == [] and list(unclear_imports(file, source)) == []


@pytest.mark.parametrize(
    ("file", "source", "modules"),
    [
        ("files/disk.py", "from lolo import trees\nfrom lolo.data import idx", ["lolo.data.idx"]),
        ("method/meta.py", "from lolo import tasks, train", ["lolo.tasks", "lolo"]),
        ("tasks/small.py", "import lolo", ["lolo"]),
        ("method/meta.py", "from lolo.files import disk", ["lolo.files.disk"]),
        ("torch/optimizer.py", "from lolo.trees import PyTree", ["lolo.trees"]),
        ("optimizers/base.py", "import lolo.data.idx as idx", ["lolo.data.idx"]),
        ("models.py", "from lolo.tasks import models\nfrom lolo.training import loop", ["lolo.training.loop"]),
        ("interop.py", "from lolo.files import disk", ["lolo.files.disk"]),
        ("__init__.py", "from lolo import trees", ["lolo.trees"]),
        ("cli/main.py", "from lolo import models", ["lolo.models"]),
    ],
)
def test_an_import_against_the_order_is_noticed(file, source, modules):
    assert against_the_order(PACKAGE / file, source) == modules


@pytest.mark.parametrize(
    "source",
    [
        "from . import trees",
        "from ..training.loop import train",
        "import lolo.trees",
        "import os, lolo.trees",
        "import importlib\nimportlib.import_module('lolo.train')",
        "import_module(f'lolo.{name}')",
        "import_module('.loop', 'training')",
        "def f():\n    return __import__('lolo.train')",
    ],
)
def test_an_import_in_an_unclear_form_is_noticed(source):
    assert list(unclear_imports(PACKAGE / "files" / "disk.py", source))


def test_imports_in_a_clear_form_pass():
    source = "import lolo.trees as trees\nfrom lolo.files import disk\nimport_module('msgpack')\nimport_module(name)"
    assert list(unclear_imports(PACKAGE / "optimizers" / "interop.py", source)) == []
    assert list(unclear_imports(PACKAGE / "__init__.py", "import_module(f'lolo.{name}')")) == []


def test_there_is_no_cycle_inside_a_folder():
    assert cycle({name_of(file): file.read_text() for file in FILES}) == []


def test_a_cycle_is_noticed_through_a_package_too():
    files = {"lolo.files.disk": "from lolo.files import jsonl", "lolo.files.jsonl": "from lolo.files.disk import sync"}
    assert cycle(files) == ["lolo.files.disk", "lolo.files.jsonl"]
    package = {
        "lolo.tasks": "from lolo.tasks.small import quadratic",
        "lolo.tasks.small": "from lolo.tasks import resolve",
    }
    assert cycle(package) == ["lolo.tasks", "lolo.tasks.small"]
    assert cycle(package | {"lolo.tasks.small": "from lolo.tasks import models"}) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_is_short(file):
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST or str(file.relative_to(PACKAGE)) in WHOLE, f"{lines} lines"


MEASURE = "import json, sys, {module}; print(json.dumps([m for m in sys.modules if m.split('.')[0] == 'lolo']))"


@pytest.mark.parametrize(
    "module, most, allowed",
    [
        ("lolo.optimizers.pretrained", 20, {"trees", "files", "kernels", "optimizers"}),
        ("lolo.method.inner", 12, {"trees", "files", "optimizers", "method"}),
        ("lolo.training.run_folder", 21, {"trees", "files", "kernels", "optimizers", "training"}),
    ],
)
def test_what_users_load_is_light(module, most, allowed):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(module=module)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    modules = [name for name in json.loads(done.stdout) if name != "lolo"]
    folders = {place(name)[0] for name in modules}
    files = [name for name in modules if place(name)[1] or place(name)[0] == "trees"]
    assert folders <= allowed and len(files) <= most, files


def test_no_function_imports_from_lolo():
    """Numbers are not reached by hiding an import. Two wait: the benchmark for torch, Triton's kernels for a GPU."""
    hidden = {str(file.relative_to(PACKAGE)): hidden_imports(file.read_text()) for file in FILES}
    assert {file for file, modules in hidden.items() if modules} <= {"bench/speed.py", "torch/triton_kernel.py"}, hidden


def test_an_import_in_a_function_is_noticed():
    assert hidden_imports("def f():\n    import lolo.training.loop as loop") == ["lolo.training.loop"]
    assert hidden_imports("class A:\n    async def f(self):\n        from lolo import train") == ["lolo"]
    assert hidden_imports("from lolo import trees\ndef f():\n    import msgpack") == []
