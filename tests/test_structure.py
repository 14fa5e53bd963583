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
FACES = {"__init__", "models", "interop"}  # they hand names on, under the paths that users import
FILES = [
    file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0].split(".")[0] not in FACES
]
LONGEST = 420  # lines of a file; Algorithm 1 is read in one piece
WHOLE = {"method/meta.py"}


def place(module):
    """Folder and file of "lolo.files.disk": ("files", "disk")."""
    parts = module.split(".")[1:]
    return parts[0], ".".join(parts[1:])


def imported(file):
    """Modules of lolo that a file imports, anywhere in it: "lolo.files.disk"."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lolo":
            for alias in node.names:
                inner = PACKAGE / pathlib.Path(*node.module.split(".")[1:], alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lolo")


def name_of(file):
    return ".".join(("lolo", *file.relative_to(PACKAGE).with_suffix("").parts))


def against_the_order(file, modules):
    """Imports that a file must not have."""
    folder = place(name_of(file))[0]
    allowed = ORDER[: ORDER.index(folder) + 1]
    return [module for module in modules if module == "lolo" or place(module)[0] not in allowed]


def test_every_folder_is_in_the_list():
    folders = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(ORDER) == folders - FACES and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_from_its_folder_and_from_folders_before_it(file):
    assert against_the_order(file, imported(file)) == []


def test_an_import_against_the_order_is_noticed():
    assert against_the_order(PACKAGE / "files" / "disk.py", ["lolo.trees", "lolo.data.idx"]) == ["lolo.data.idx"]
    assert against_the_order(PACKAGE / "method" / "meta.py", ["lolo.tasks", "lolo"]) == ["lolo.tasks", "lolo"]


def test_there_is_no_cycle_inside_a_folder():
    left = {
        name_of(file): {m for m in imported(file) if m != name_of(file)} for file in FILES if file.stem != "__init__"
    }
    while free := [module for module, needs in left.items() if not needs & set(left)]:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"cycle among {sorted(left)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_is_short(file):
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST or str(file.relative_to(PACKAGE)) in WHOLE, f"{lines} lines"


MEASURE = "import json, sys, {module}; print(json.dumps([m for m in sys.modules if m.split('.')[0] == 'lolo']))"


@pytest.mark.parametrize(
    "module, most, allowed",
    [
        ("lolo.optimizers.pretrained", 16, {"trees", "files", "optimizers"}),
        ("lolo.method.inner", 12, {"trees", "files", "optimizers", "method"}),
        ("lolo.training.run_folder", 17, {"trees", "files", "optimizers", "training"}),
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
    """Numbers are not reached by hiding an import. Only PyTorch's part of the benchmark waits until torch is found."""
    hidden = []
    for file in FILES:
        for outer in ast.walk(ast.parse(file.read_text())):
            if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(outer):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lolo":
                        hidden.append((str(file.relative_to(PACKAGE)), node.module))
    assert {file for file, _ in hidden} <= {"bench/speed.py"}, hidden
