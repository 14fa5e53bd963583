"""What lies in the folder of a meta-training."""

from __future__ import annotations

from pathlib import Path


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an outer step lies."""
    return run / "checkpoints" / f"{step:08d}"


def checkpoints(run: Path) -> list[int]:
    """Outer steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and len(name) == 8)
