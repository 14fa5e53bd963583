"""Weights of the Hugging Face Hub: what is asked for, what is not, and errors that say what to do. No network."""

import os
import subprocess
import sys
import types

import pytest
from test_files import LEARNER, meta_params

import lolo
from lolo.cli import main as cli
from lolo.files import tensors
from lolo.optimizers import weights_file

REPO = "someone/optimizer"


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    pass


class HfHubHTTPError(OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class RevisionNotFoundError(HfHubHTTPError):
    pass


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub, whose classes inherit as the real ones: a list of what was asked for. It answers
    with the file of that name in `tmp_path`, or raises `asked.error`."""

    class Asked(list):
        error = None

    asked = Asked()

    def hf_hub_download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        if asked.error is not None:
            raise asked.error
        return str(tmp_path / filename)

    errors = (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError)
    names = {kind.__name__: kind for kind in (*errors, RevisionNotFoundError)}
    fake = types.ModuleType("huggingface_hub")
    fake.hf_hub_download, fake.errors = hf_hub_download, types.SimpleNamespace(**names)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "file", "revision"),
    [
        (REPO, "model.safetensors", None),
        (f"{REPO}/small.safetensors", "small.safetensors", None),
        (f"{REPO}/runs/a/last.safetensors", "runs/a/last.safetensors", None),
        (f"{REPO}@v1", "model.safetensors", "v1"),
        (f"{REPO}@0123abc/small.safetensors", "small.safetensors", "0123abc"),
    ],
)
def test_an_id_is_loaded_like_a_file(tmp_path, asked, name, file, revision):
    weights_file.write_weights(tmp_path / file, meta_params(), learner=LEARNER, card={"summary": "theirs"})
    weights = lolo.load(name)
    assert weights.card == {"summary": "theirs"} and weights.learner.hidden == 4
    assert asked == [(REPO, file, revision)]


@pytest.mark.parametrize(
    "name", ["weights", "missing.safetensors", "folder/missing.safetensors", "runs/a/last.safetensors", "runs/a"]
    + ["/a/b", "./a/b", "../a/b", "a//b", "a/b/c", "a/b/c.bin", "a b/c"],
)  # fmt: skip
def test_a_mistyped_path_asks_no_network(tmp_path, asked, name):
    (tmp_path / "runs").mkdir()
    with pytest.raises(lolo.FileError, match="no such weights file"):
        lolo.load(name)
    assert asked == []


def test_a_path_object_is_never_an_id(tmp_path, asked):
    with pytest.raises(lolo.FileError, match="no such weights file"):
        lolo.load(weights_file.Path(REPO))
    assert asked == []


def test_a_file_that_exists_is_preferred(tmp_path, asked):
    weights_file.write_weights(tmp_path / REPO / "mine.safetensors", meta_params(), learner=LEARNER)
    assert lolo.load(f"{REPO}/mine.safetensors").learner.hidden == 4
    assert asked == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("no route"), "can't be reached, and model.safetensors is not in its cache"),
        (EntryNotFoundError("404"), "has no model.safetensors.*someone/optimizer/NAME.safetensors"),
        (RepositoryNotFoundError("401"), "no such repository.*hf auth login"),
        (RevisionNotFoundError("404"), "has no revision v2"),
        (HfHubHTTPError("500 Server Error\nmore"), r"\(500 Server Error\)"),
        (ConnectionError(""), r"\(ConnectionError\)"),
        (ValueError("Cannot have -- in repo_id"), "Cannot have -- in repo_id"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_say_what_to_do(asked, error, words):
    asked.error = error
    with pytest.raises(lolo.FileError, match=words) as raised:
        lolo.load(f"{REPO}@v2")
    assert "\n" not in str(raised.value)


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["eval", REPO]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'lolo[hub]'" in err and REPO in err


def test_what_the_hub_holds_is_checked_like_any_file(tmp_path, asked):
    (tmp_path / weights_file.HUB_FILE).write_bytes(tensors.pack({"layer": meta_params()["b0"]}, {"format": "pt"}))
    with pytest.raises(lolo.FileError, match="not lolo weights"):
        lolo.load(REPO)


@pytest.mark.slow
def test_the_real_library_says_when_it_is_offline(tmp_path):
    code = f"from lolo.optimizers import weights_file; weights_file.read_weights({REPO!r})"
    asked = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 1
    assert f"FileError: {REPO}: the Hugging Face Hub can't be reached" in asked.stderr.splitlines()[-1]
