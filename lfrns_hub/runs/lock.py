"""The lock of a folder: only one process writes to it, and a lock ends with its process."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from lfrns_hub.format.untrusted import short
from lfrns_hub.runs.atomic import sweep
from lfrns_hub.runs.places import name_of, place_of

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]

# By process and lock file: the descriptors, one for each time that it is held. A forked child holds none.
_HELD: dict[tuple[int, Path], list[int | None]] = {}


@contextlib.contextmanager
def locked(path: str | os.PathLike, call: str) -> Iterator[None]:
    """Lock a file or folder against other processes, and remove drafts that dead processes left.

    The same process may lock it several times. Nothing is locked if the file system does not support locks.

    Args:
        path: The file or folder, which may not exist; links are resolved.
        call: The user's call, for the error.
    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The path cannot be written to.
    """
    path = Path(os.path.realpath(path))  # `resolve` has its own error for a name that is too long
    try:
        lock = place_of(path) / f"{name_of(path)}.lock"
        key = (os.getpid(), lock)
        with contextlib.suppress(FileNotFoundError):  # a name that is too long raises another error
            path.stat()
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        held = _HELD.get(key, [])
        held.append(held[0] if held else _acquire(lock))
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{call}: process {short(error.strerror, 20)} is writing to {str(path)!r}. Wait for its end, or name "
            "another folder."
        ) from error
    except OSError as error:
        where = path if os.path.isdir(path) else path.parent
        raise OSError(
            f"{call}: {str(where)!r} cannot be written ({error.strerror}). Name a folder that can."
        ) from error
    _HELD[key] = held
    try:
        if len(held) == 1 and held[0] is not None:
            sweep(path)
        yield
    finally:
        descriptor = held.pop()
        if not held:
            del _HELD[key]
            with contextlib.suppress(OSError):
                lock.unlink()
            if descriptor is not None:
                os.close(descriptor)


def _acquire(lock: Path) -> int | None:
    """Lock a file and return its descriptor, None without locks.

    By `lockf`, not `flock`: a forked worker would keep holding the latter when this process is killed.
    """
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            owner = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(error.errno, owner or "of another machine") from error
        except (AttributeError, OSError):
            os.close(descriptor)
            return None
        is_there = False
        with contextlib.suppress(FileNotFoundError):
            is_there = os.path.samestat(os.fstat(descriptor), lock.stat())
        if is_there:
            with contextlib.suppress(OSError):  # a full disk: then the lock does not name its holder
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder has ended and removed the name
