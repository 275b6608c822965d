"""Files and folders that change completely or not at all, even if the process is killed during any system call."""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.runs.places import name_of, place_of

PARTIAL = ".partial"
JOURNAL = ".lfrns-next"  # in a folder: the files of a change that is decided but not complete
NAMES = "names.json"  # in it: the names to remove from the folder, and those to put in
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

_LIVE: set[Path] = set()  # the drafts of this process


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Return a path to write a file or folder to; it replaces `path` if the context ends without an error.

    It lies in its own folder, where a killed writer may leave temporary files; the next call removes them.

    Raises:
        OSError: It could not be written. The earlier content of `path` is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    partial.mkdir()
    try:
        yield partial / path.name
        rename_synced(partial / path.name, path)
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Create an empty folder to prepare a file or folder in, which is then moved into place; removed at the end.

    Args:
        path: Destination of the prepared files, links resolved; the caller holds its lock.
    """
    draft = place_of(path) / f"{name_of(path)}-{secrets.token_hex(4)}"
    _LIVE.add(draft)
    try:
        draft.mkdir()
        if path.is_dir():
            shutil.copymode(path, draft)  # keeps private permissions
        yield draft
    finally:
        _LIVE.discard(draft)
        shutil.rmtree(draft, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove drafts of a file or folder that dead processes left; the caller holds its lock."""
    for place in {path.parent, path} if path.is_dir() else {path.parent}:
        for draft in place.glob(f"{name_of(path)}-*"):
            if draft not in _LIVE:
                shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, folder: Path, ours: Callable[[str], bool], *, exchanged: bool = True) -> None:
    """Replace a folder's own files by the files of a draft, in one step; all other files in it stay.

    The draft, with hard links to the other files, is exchanged for the folder if the system supports this. Otherwise,
    if the folder itself has to stay (a mount point, the working directory), or if it has nothing to replace, the draft
    becomes a journal in it: from then on the change is decided, and `settle` completes it.

    Args:
        draft: A draft from `draft_of`, with files.
        folder: Destination, which may not exist, links resolved. A link in it is replaced, never its target.
        ours: Returns whether a name in the folder is one to be removed.
        exchanged: Whether the folder may be exchanged; False if others write to it at the same time.
    Raises:
        OSError: It could not be written. The folder is unchanged, or `settle` completes the change.
    """
    settle(folder, ours)
    names = sorted(path.name for path in draft.iterdir())
    _take(draft)
    there = [path.name for path in folder.iterdir()] if folder.exists() else None
    stays = draft.parent != folder.parent or _is_working_directory(folder)
    if there is None or not (there or stays):
        draft.rename(folder)
        return _sync(folder.parent)
    if exchanged and not stays and any(map(ours, there)) and _carried(folder, draft, ours) and exchange(draft, folder):
        _sync(folder.parent)
        _carried(draft, folder, ours)  # files that others added in between; the caller removes the rest
        return None
    for path in draft.iterdir():  # links carried over before the failure
        if path.name not in names:
            remove(path)
    leaving = sorted(name for name in there if ours(name) and name not in names)
    (draft / NAMES).write_text(json.dumps({"leave": leaving, "put": names}), encoding="utf-8")
    _sync(draft / NAMES)
    draft.rename(folder / JOURNAL)
    return settle(folder, ours)


def settle(folder: Path, ours: Callable[[str], bool]) -> None:
    """Complete the change of a folder that was decided before its process was killed; any process may, at any time.

    Args:
        folder: The folder, which may not exist.
        ours: Returns whether a name in it may be replaced or removed: the journal may be untrusted.
    Raises:
        OSError: The folder cannot be written to.
        ValueError: It has a journal that `put_in_place` did not write.
    """
    journal = folder / JOURNAL
    if journal.is_symlink() or not journal.is_dir():
        return
    call = f"{str(folder)!r}, a change of which was cut off"
    try:
        if (journal / NAMES).exists():
            _complete(folder, journal, read_json(journal / NAMES, call), ours)
        shutil.rmtree(journal)
    except FileNotFoundError:  # another process completes it at the same time
        return
    except OSError as error:
        raise OSError(f"{call}: it cannot be completed ({error.strerror}). Make it writable, then load it.") from error


def _complete(folder: Path, journal: Path, names: dict[str, Any], ours: Callable[[str], bool]) -> None:
    """Do the remaining steps of a journal."""
    leave, put = names.get("leave"), names.get("put")
    for name in [*leave, *put] if isinstance(leave, list) and isinstance(put, list) else [None]:
        if not isinstance(name, str) or "/" in name or not ours(name):
            raise ValueError(f"{str(folder)!r}: the journal {JOURNAL} in it names {short(name)}. Remove that folder.")
    for name in leave:
        remove(folder / name)
    for name in put:
        if (journal / name).exists():
            (journal / name).replace(folder / name)
    _sync(folder)
    (journal / NAMES).unlink()


def exchange(first: Path, second: Path) -> bool:
    """Swap two files or folders in one step; return False, with both unchanged, if this is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return not renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)


def rename_synced(partial: Path, path: Path) -> None:
    """Flush a file or folder to disk, then give it its name."""
    _take(partial)
    if path.is_dir() and not path.is_symlink():
        remove(path)
    partial.replace(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; for a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _carried(source: Path, target: Path, ours: Callable[[str], bool]) -> bool:
    """Link others' files in one folder into another, except those already there; return whether this is possible."""
    try:
        for path in source.iterdir():
            if not ours(path.name):
                _link(path, target / path.name)
    except OSError:  # another device, a file system without hard links, files of another user
        return False
    return True


def _link(source: Path, target: Path) -> None:
    """Link a file, or a folder's files, to another name; existing files stay."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            _link(path, target / path.name)
        shutil.copystat(source, target)
    else:
        with contextlib.suppress(FileExistsError):
            os.link(source, target, follow_symlinks=False)


def _is_working_directory(folder: Path) -> bool:
    """Return whether this process works in a folder, or below: its shell would be left in a deleted folder."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _take(path: Path) -> None:
    """Set files to the mode given by the umask, and flush them to disk."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)
            _sync(file)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)
