"""A cache of the results of `slim`'s steps, in a folder, by a hash of everything they depend on."""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfrns_hub.format.door import call
from lfrns_hub.runs import remove, written_aside
from lfrns_hub.runs.checkpoints import Stopped, caught_sigterm
from lfrns_hub.runs.processes import ALONE, Processes

VERSIONS = [version(name) for name in ("torch", "timm", "transformers")]
KEPT = 2  # contents: the last used, and the one before
STEPS_BETWEEN = 20  # of the gates' training, between two saves
_FILE = re.compile(r"[a-z]+-([0-9a-f]{16})-[0-9a-f]{16}\.safetensors(\.partial)?")  # content, then the step's own hash


class Cache:
    """Results of expensive steps, in one folder that all processes see, or nowhere.

    The results of a content stay until two other contents have been used after it: then its files are removed.

    Args:
        directory: The folder, which may not exist; None stores nothing. It may be removed at any time.
        processes: Processes of the run; the main one writes. None: only this one.
        content: Everything that all results depend on: the model, images, options; this package's code and the versions
            of torch, timm and transformers are added. Another content finds none of these results.
    """

    def __init__(self, directory: str | os.PathLike | None, processes: Processes | None, *content: Any):
        self.directory = None if directory is None else Path(directory)
        self.processes = processes = processes or ALONE
        self._call = call("slim")
        if directory is not None:
            code = [path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
            self._content = digest(code, VERSIONS, processes.count, *content)

    def keep(self, name: str, compute: Callable[[], Any], *content: Any) -> Any:
        """Return the stored result, or compute and store it.

        Args:
            name: Name of the step.
            compute: Returns dicts (names to values), lists, tensors, numbers, strings and None, also nested.
            content: Further dependencies of the step. With a function, which has no content to compare, nothing is
                stored.
        Returns:
            The result of `compute`, now or when it was stored, bit by bit; stored tensors are on the CPU.
        Raises:
            OSError: It could not be written. Earlier results are still there.
        """
        if self.directory is None or any(callable(part) for part in content):
            return compute()
        path = self._path(name, content)
        found = self._read(path)
        if found is None:
            found = compute()
            self._write(path, found)
        return found

    @contextlib.contextmanager
    def training(self, name: str, *content: Any) -> Iterator["Training | None"]:
        """Store the state of a short training while it runs; yields None without a folder.

        Args:
            name: Name of the step.
            content: Further dependencies of the training.
        """
        if self.directory is None:
            yield None
            return
        with caught_sigterm() as told:
            yield Training(self, self._path(name, content), told)

    def _path(self, name: str, content: tuple[Any, ...]) -> Path:
        """Return the file of a step."""
        return self.directory / f"{name}-{self._content}-{digest(*content)}.safetensors"

    def _read(self, path: Path) -> Any:
        """Return the content of a file, None if any process does not find it complete."""
        found = None
        # A damaged file is computed again: cut short, without metadata, with values of another file.
        damaged = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
        with contextlib.suppress(*damaged):
            if path.is_file():  # a pipe would never end
                found = _open(path)
                os.utime(path)
        return None if self.processes.any(found is None) else found[0]

    def _write(self, path: Path, value: Any) -> None:
        """Write a value on the main process; if that fails, raise an error on all."""

        def write() -> None:
            tensors: dict[str, Tensor] = {}
            text = json.dumps(_split(value, tensors))
            tensors = dict(sorted(tensors.items()))
            with written_aside(path) as partial:
                save_file(tensors, partial, metadata={"value": text, "digest": digest(text, tensors)})
            self._sweep()

        failed, error = self.processes.attempt(write, OSError, SafetensorError, main_only=True)
        if failed:
            raise OSError(
                f"{self._call}(checkpoint_dir={str(self.directory)!r}): the folder cannot be written to "
                f"({error or 'on the main process'}). What was kept there before is there still. Make room, or name "
                "another folder."
            ) from error

    def _sweep(self) -> None:
        """Remove files of all contents except the last two used, including half-written files."""
        used: dict[str, float] = {self._content: math.inf}
        files = [(path, found[1]) for path in self.directory.iterdir() if (found := _FILE.fullmatch(path.name))]
        for path, content in files:
            with contextlib.suppress(FileNotFoundError):  # another program swept too
                used[content] = max(used.get(content, 0.0), path.stat().st_mtime)
        kept = sorted(used, key=used.__getitem__)[-KEPT:]
        for path, content in files:
            if content not in kept:
                remove(path)


def _open(path: Path) -> tuple[Any] | None:
    """Return the content of a file, in a tuple; None if it is not as written."""
    with safe_open(path, "pt") as file:
        stored, tensors = file.metadata(), {key: file.get_tensor(key) for key in sorted(file.keys())}
    if stored["digest"] != digest(stored["value"], tensors):
        return None
    return (_join(json.loads(stored["value"]), tensors),)


class Training:
    """The state of a short training, saved at intervals; `load` at its start, `after` each step."""

    def __init__(self, cache: Cache, path: Path, told: Any):
        self._cache, self._path, self._told = cache, path, told

    def load(self) -> Any:
        """Return the last saved state, None if there is none."""
        return self._cache._read(self._path)

    def after(self, step: int, state: Callable[[], Any], *, last: bool) -> None:
        """Save the state every twenty steps and at the end; after a SIGTERM, save it and end the program (exit code 0).

        Args:
            step: Number of steps done.
            last: Whether this is the last step.
            state: Returns the state for `load`, in the form of `Cache.keep`.
        """
        stopping = self._cache.processes.any(self._told.is_set())
        if stopping or last or step % STEPS_BETWEEN == 0:
            self._cache._write(self._path, state())
        if stopping:
            if self._cache.processes.is_main:
                where = f"step {step} of the gates' training, saved in {self._cache.directory}"
                print(f"SIGTERM: stopped after {where}. The same call goes on from there.", file=sys.stderr, flush=True)
            raise Stopped(0)


def digest(*parts: Any) -> str:
    """Return a hash, 16 hex digits, of tensors' bytes, models, and plain data.

    Example:
        >>> digest(torch.zeros(2), {"a": 1}) == digest(torch.zeros(2), {"a": 1}) != digest(torch.zeros(3), {"a": 1})
        True
    """
    hashed = hashlib.blake2b(digest_size=8)

    def add(part: Any) -> None:
        if isinstance(part, nn.Module):
            modules = {type(module).__module__ for module in part.modules()}  # a forward pass is not in the repr
            files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
            add([Path(file).read_bytes() for file in files if file])
            add([type(part).__qualname__, repr(part), dict(part.named_parameters()), dict(part.named_buffers())])
            add([str(p.device.type) for p in part.parameters()])  # another device rounds differently
        elif isinstance(part, Tensor):
            hashed.update(f"tensor {part.dtype} {list(part.shape)} ".encode())
            hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            hashed.update(f"dict {len(part)} ".encode())
            for key, value in part.items():
                add(key)
                add(value)
        elif isinstance(part, (list, tuple)):
            hashed.update(f"list {len(part)} ".encode())
            for value in part:
                add(value)
        else:
            text = repr(part)
            hashed.update(f"{type(part).__name__} {len(text)} {text} ".encode())

    add(parts)
    return hashed.hexdigest()


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON of a value, its tensors moved to `tensors` and replaced by their names."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _split(part, tensors) for key, part in value.items()}}
    if isinstance(value, list):
        return [_split(part, tensors) for part in value]
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_split`."""
    if isinstance(value, list):
        return [_join(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _join(part, tensors) for key, part in value["dict"].items()}
    return value
