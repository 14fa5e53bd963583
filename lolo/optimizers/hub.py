"""Weights on the Hugging Face Hub, fetched by huggingface_hub (extra `hub`) into its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DEFAULT_FILE = "model.safetensors"
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+\.safetensors))?"
)


class HubError(ValueError):
    """Weights that can't be had from the Hub: names them, and what to do."""


class HubFile(NamedTuple):
    """One file of a repository."""

    repo: str  # user/repo
    revision: str | None  # branch, tag or commit; None: the newest
    file: str


def parse(name: str) -> HubFile | None:
    """The Hub file that `user/repo[@revision][/file.safetensors]` means; None for what can only be a local path."""
    match = _ID.fullmatch(name)
    if match is None or (match["file"] is None and name.endswith(".safetensors")):
        return None
    # A mistyped path in a folder that exists must not ask the network.
    if Path(name).exists() or Path(name.partition("/")[0]).exists():
        return None
    return HubFile(match["repo"], match["revision"], match["file"] or DEFAULT_FILE)


def fetch(wanted: HubFile) -> Path:
    """The file on this machine, downloaded unless the cache has it.

    Raises HubError: huggingface_hub is missing, no network, no such repository, revision or file.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise HubError(
            f"{wanted.repo}: no such file or folder here, and to get it from the Hugging Face Hub the extra is "
            "missing: pip install 'lolo[hub]'."
        ) from error
    at = f"{wanted.repo} at {wanted.revision}" if wanted.revision else wanted.repo
    try:
        return Path(huggingface_hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{at}: the Hugging Face Hub can't be reached, and {wanted.file} is not in its cache. Connect and try "
            "again, or give the path of a file."
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"{at}: has no {wanted.file} on the Hugging Face Hub; name the file: {wanted.repo}/NAME.safetensors."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{wanted.repo}: has no revision {wanted.revision} on the Hugging Face Hub.") from error
    except errors.RepositoryNotFoundError as error:  # a gated one is of this class too
        raise HubError(
            f"{wanted.repo}: no such file here, and no such repository on the Hugging Face Hub that you may read. "
            "Mind the spelling; for a private one log in with `hf auth login`."
        ) from error
    except (OSError, ValueError) as error:  # the connection, the server, the disk, or a name the Hub does not allow
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"{at}: can't be had from the Hugging Face Hub ({reason}). Check the name and the connection."
        ) from error
