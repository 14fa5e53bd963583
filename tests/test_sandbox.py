"""Whatever a parser does in the sandbox's child, the parent sees its answer or DataError."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lolo.data import sandbox
from lolo.data.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


CHILD = """
import ctypes, os, pathlib, subprocess, sys, time
from lolo.data import DataError

def answer(file, scratch, *more): return [file, *more]
def refuse(file, scratch): raise DataError("this file is not good")
def fail(file, scratch): raise KeyError("what")
def crash(file, scratch): ctypes.string_at(0)
def leave(file, scratch): os._exit(0)
def shout(file, scratch): print("last words"); sys.stdout.flush(); os._exit(3)
def sleep(file, scratch): time.sleep(60)
def compute(file, scratch):
    while True: pass
def allocate(file, scratch): bytearray(1 << 31)
def fill(file, scratch): pathlib.Path(scratch, "big").write_bytes(bytes(1 << 26))
def environment(file, scratch): return dict(os.environ)
def tell(file, scratch): pathlib.Path(file).write_text(str(os.getpid())); time.sleep(60)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """The functions above as a module that the sandbox's child can import too."""
    (tmp_path / "sandbox_child.py").write_text(CHILD)
    monkeypatch.setattr(sandbox, "IMPORT_FROM", [*sandbox.IMPORT_FROM, str(tmp_path)])
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("sandbox_child", None)
    return __import__("sandbox_child")


def test_the_sandbox_returns_what_the_function_returns(child, tmp_path):
    assert sandbox.run(child.answer, "a file", tmp_path, 1, [2, "three"]) == ["a file", 1, [2, "three"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuse", "^this file is not good$"),
        ("fail", r"^bad.h5: can't be read \(KeyError: 'what'\); fetch"),
        ("crash", "^bad.h5: its reader died .signal 11"),
        ("leave", "^bad.h5: its reader died .exit status 0"),
        ("shout", "exit status 3; limits .*: last words"),
        ("sleep", "^bad.h5: reading it took more than 3 s"),
        ("compute", "^bad.h5: its reader died .signal 24"),
        ("allocate", "^bad.h5: reading it needs more than 1 GiB of memory"),
        ("fill", "can't be read .OSError|signal 25"),
    ],
)
def test_whatever_happens_in_the_sandbox_is_the_documented_error(child, tmp_path, monkeypatch, name, message):
    if name == "fill":
        monkeypatch.setattr(sandbox, "OUTPUT_BYTES", 1 << 20)
    with pytest.raises(DataError, match=message):
        sandbox.run(getattr(child, name), "bad.h5", tmp_path, memory_bytes=1 << 30, seconds=1)


def test_the_sandbox_passes_no_environment_on(child, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert "SECRET" not in sandbox.run(child.environment, "", tmp_path)


def test_the_sandbox_ends_with_its_parent(child, tmp_path):
    pid_file = tmp_path / "pid"
    paths = [str(ROOT), str(tmp_path)]
    code = f"""
        import sys; sys.path[:0] = {paths!r}
        import sandbox_child; from pathlib import Path; from lolo.data import sandbox
        sandbox.IMPORT_FROM = {paths!r}
        sandbox.run(sandbox_child.tell, {str(pid_file)!r}, Path({str(tmp_path)!r}))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    pid = wait_for(lambda: pid_file.exists() and int(pid_file.read_text() or 0))
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not running(pid))


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def wait_for(condition):
    for _ in range(300):
        if value := condition():
            return value
        time.sleep(0.1)
    return None
