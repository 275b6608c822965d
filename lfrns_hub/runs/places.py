"""Where the drafts and the lock of a folder lie: next to it, or inside where nothing can be renamed next to it."""

import hashlib
import os
from pathlib import Path

PREFIX = ".lfrns-"


def place_of(path: Path) -> Path:
    """Return the folder for the drafts and the lock of a file or folder; folders above `path` are made.

    That is the folder above, from where a draft is renamed into place. A mount point, and a folder whose parent cannot
    be written to, hold their own.
    """
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and (path.stat().st_dev != parent.stat().st_dev or not os.access(parent, os.W_OK)):
        return path
    return parent


def entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, but for drafts and locks."""
    return [path for path in folder.iterdir() if not path.name.startswith(PREFIX)]


def name_of(path: Path) -> str:
    """Return what the names of a path's drafts and of its lock begin with: as short for a long name as for any."""
    return PREFIX + hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
