"""What a build makes of the package: the kernel, with sanitizers too, a wheel of its platform, and the metadata."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    program = tmp_path_factory.mktemp("sanitized") / "kernel"
    flags = ["-std=gnu++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
    subprocess.run([COMPILER, *flags, ROOT / "tests" / "kernel_main.cc", "-o", program], check=True)
    return program


@needs_compiler
@pytest.mark.slow
def test_no_form_reads_or_writes_past_an_array(sanitized):
    done = subprocess.run([sanitized], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    assert int(done.stdout) > 1000


@needs_compiler
@pytest.mark.slow
def test_an_array_that_is_too_short_is_noticed(sanitized):
    done = subprocess.run([sanitized, "broken"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.fixture
def hook(monkeypatch):
    """hatch_build.py, which needs of hatchling the classes that its own are children of."""
    needed = {
        "hatchling.builders.hooks.plugin.interface": "BuildHookInterface",
        "hatchling.metadata.plugin.interface": "MetadataHookInterface",
    }
    for name, of in needed.items():
        parts = name.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
        setattr(sys.modules[name], of, object)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(hook, version="standard"):
    """build_data after the hook, and what it said."""
    one, said, data = hook.CustomBuildHook(), [], {"force_include": {}}
    one.root, one.app = str(ROOT), types.SimpleNamespace(display_info=said.append)
    one.initialize(version, data)
    files = {inside: pathlib.Path(out).is_file() for out, inside in data["force_include"].items()}
    one.finalize(version, data, "")
    return data, files, said


@needs_compiler
@pytest.mark.slow
def test_a_wheel_with_the_library_is_of_its_platform(hook):
    data, files, said = build(hook)
    assert files == {hook.LIBRARY: True} and data["pure_python"] is False
    assert data["tag"].startswith("py3-none-") and not data["tag"].endswith("any")
    assert said == ["lolo: CPU kernels were built for JAX and PyTorch."]


@pytest.mark.parametrize("variables", [{"LOLO_BUILD_KERNEL": "0"}, {"CXX": "no-such-compiler"}, {"CXX": "false"}])
def test_without_a_compiler_that_works_the_wheel_is_pure_python(hook, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build(hook) == ({"force_include": {}}, {}, ["lolo: no CPU kernels were built."])


@needs_compiler
def test_jaxlib_is_asked_for_only_where_there_is_a_compiler(hook, monkeypatch):
    assert hook.CustomBuildHook().dependencies() == ["jaxlib>=0.10"]
    monkeypatch.setenv("LOLO_BUILD_KERNEL", "0")
    assert hook.CustomBuildHook().dependencies() == []


@needs_compiler
@pytest.mark.slow
def test_without_jaxlibs_headers_the_library_serves_pytorch_alone(hook, monkeypatch, tmp_path):
    monkeypatch.setattr(hook, "xla_flags", list)
    assert hook.compile_library(ROOT, tmp_path / "kernel.so").startswith("for PyTorch alone")
    assert b"lolo_norm_fc_step" in (tmp_path / "kernel.so").read_bytes()
    assert b"lolo_norm_fc_step_xla" not in (tmp_path / "kernel.so").read_bytes()


def metadata(hook, monkeypatch, repository):
    monkeypatch.setenv("LOLO_REPOSITORY", repository)
    one, found = hook.CustomMetadataHook(), {"version": PROJECT["version"]}
    one.root = str(ROOT)
    one.update(found)
    return found


def test_a_release_leads_to_files_of_its_version(hook, monkeypatch):
    found = metadata(hook, monkeypatch, "https://example.org/me/lolo/")
    targets = re.findall(r"\]\(([^)]+)\)", found["readme"]["text"])
    start = re.compile(rf"https://example.org/me/lolo/(blob|raw)/v{re.escape(PROJECT['version'])}/")
    inside = [target for target in targets if start.match(target)]
    assert len(inside) > 5 and all((ROOT / start.sub("", target).partition("#")[0]).exists() for target in inside)
    assert all(re.match("https?:", target) for target in targets)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", found["readme"]["text"])
    assert pictures and all("/raw/" in picture for picture in pictures)
    assert found["urls"]["Homepage"] == "https://example.org/me/lolo"


def test_without_an_address_the_links_stay_as_they_are(hook, monkeypatch):
    found = metadata(hook, monkeypatch, "")
    assert "urls" not in found and found["readme"]["text"] == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](b.md#c)", "[a](R/blob/v1/b.md#c)"),
        ("![a b](c/d.svg)", "![a b](R/raw/v1/c/d.svg)"),
        ("[a](#b) [c](mailto:d@e.f) [g](https://h.i/j.md)", "[a](#b) [c](mailto:d@e.f) [g](https://h.i/j.md)"),
    ],
)
def test_relative_links_become_absolute_ones(hook, before, after):
    assert hook.absolute_links(before, "R", "1") == after


def test_the_source_distribution_has_what_its_build_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/README.md", "/hatch_build.py", "/lolo"} <= set(included)
    assert all((ROOT / path.lstrip("/")).exists() for path in included)


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
