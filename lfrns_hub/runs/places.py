"""Place of the drafts and the lock of a folder: next to it, or inside if nothing can be renamed next to it."""

import hashlib
import os
from pathlib import Path

PREFIX = ".lfrns-"


def place_of(path: Path) -> Path:
    """Return the folder for the drafts and the lock of a file or folder; parent folders of `path` are created.

    This is the parent folder, from which a draft is renamed into place. A mount point, or a folder whose parent cannot
    be written to, contains its own.
    """
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and (path.stat().st_dev != parent.stat().st_dev or not os.access(parent, os.W_OK)):
        return path
    return parent


def entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, except drafts and locks."""
    return [path for path in folder.iterdir() if not path.name.startswith(PREFIX)]


def name_of(path: Path) -> str:
    """Return the prefix of the names of a path's drafts and lock: short even for a long name."""
    return PREFIX + hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
