"""Print the path of a Chromium, for `make browser-test`; Debian's is installed if there is none and root asks."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")


def find() -> str | None:
    """$LOLO_CHROMIUM, or the first of NAMES on the path."""
    return os.environ.get("LOLO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Debian's package. Its words go to stderr: stdout is for the path."""
    for command in ("update -q", "install -y -q --no-install-recommends chromium"):
        subprocess.run(["apt-get", *command.split()], check=True, stdout=sys.stderr)


def main() -> int:
    """Exit status 0 and the path, or 1 and what to do."""
    if find() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install()
    path = find()
    if path is None:
        print(
            "no Chromium found: install it (Debian: apt-get install chromium), or set LOLO_CHROMIUM.", file=sys.stderr
        )
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
