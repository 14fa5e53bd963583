"""What Hatch runs when it builds the package.

It builds the CPU kernels where there is a C++ compiler; without one, or where it fails, the wheel is pure Python. $CXX
names another compiler. LOLO_BUILD_KERNEL=0 builds none. The part for JAX needs the headers of XLA's FFI, which lie in
jaxlib; without them the library serves PyTorch alone.

$LOLO_REPOSITORY is the address of the repository's web page, as a release has it: it becomes the project's addresses,
and README.md's links and pictures, which are relative, lead there. Without it there are none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

LIBRARY = "lolo/kernels/_norm_fc.so"
SOURCE = "lolo/kernels/norm_fc.cc"
# Nothing of the build machine's processor: the source says which functions are for which.
FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")


def compiler() -> list[str]:
    """The command of the C++ compiler; empty where there is none, or none is to be used."""
    if os.environ.get("LOLO_BUILD_KERNEL") == "0" or os.name == "nt":
        return []
    named = shlex.split(os.environ.get("CXX", ""))
    found = [named] if named else [[name] for name in ("c++", "g++", "clang++")]
    return next((command for command in found if shutil.which(command[0])), [])


def xla_flags() -> list[str]:
    """What the part for JAX needs; empty without jaxlib's headers."""
    spec = importlib.util.find_spec("jaxlib")
    places = [Path(place) / "include" for place in (spec.submodule_search_locations or ())] if spec else []
    return next(([f"-isystem{x}", "-DLOLO_XLA"] for x in places if (x / "xla/ffi/api/ffi.h").is_file()), [])


def compile_library(root: Path, out: Path) -> str:
    """Compile the library, atomically. Returns: what was built, in words; empty if nothing was."""
    command = compiler()
    if not command:
        return ""
    for extra in ([xla_flags()] if xla_flags() else []) + [[]]:
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / out.name
            line = [*command, *FLAGS, *extra, str(root / SOURCE), "-o", str(draft)]
            if subprocess.run(line, capture_output=True, check=False).returncode == 0:
                # Onto the same disk first: a process may have the old library loaded.
                beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
                shutil.copy(draft, beside)
                beside.replace(out)
                return "for JAX and PyTorch" if extra else "for PyTorch alone: jaxlib's headers were not found"
    return ""


class CustomBuildHook(BuildHookInterface):
    def dependencies(self) -> list[str]:
        return ["jaxlib>=0.10"] if compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        self.folder = tempfile.mkdtemp()
        out = root / LIBRARY if version == "editable" else Path(self.folder) / Path(LIBRARY).name
        built = compile_library(root, out)
        self.app.display_info(f"lolo: CPU kernels were built {built}." if built else "lolo: no CPU kernels were built.")
        if built and version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["force_include"][str(out)] = LIBRARY
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def absolute_links(text: str, repository: str, version: str) -> str:
    """Markdown whose relative links and pictures lead to the files of a version in a repository."""

    def absolute(found: re.Match[str]) -> str:
        is_picture, words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found.group()
        return f"{is_picture}[{words}]({repository}/{'raw' if is_picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository := os.environ.get("LOLO_REPOSITORY", "").rstrip("/"):
            version = metadata["version"]
            text = absolute_links(text, repository, version)
            metadata["urls"] = {
                "Homepage": repository,
                "Documentation": f"{repository}/tree/v{version}/docs",
                "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
