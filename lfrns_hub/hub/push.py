"""Upload to the Hub and download from it: the only file that uses huggingface_hub's HTTP client."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    metadata_load,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import distributed

from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.hub.handwritten import merge_cards
from lfrns_hub.hub.lineage import KEYS, UNKNOWN, refuse_unlicensed
from lfrns_hub.runs import settle

# Base class of the client's HTTP errors, through one of them: the library below huggingface_hub changes with versions.
TransportError = HfHubHTTPError.__bases__[0]
WEIGHTS, INDEX, GALLERY = "model.safetensors", "model.safetensors.index.json", "clusters.png"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Files that `save` writes, and that it may find from an earlier save.
SAVED = (
    "README.md",
    "config.json",
    "record.json",
    "preprocessor_config.json",
    "modeling_lfrns.py",
    "widths.png",
    "curve.png",
    GALLERY,
    WEIGHTS,
)
# Files of a checkpoint, written by `save`, save_pretrained, the Trainer or timm. Pickles are neither sent nor fetched,
# nor are training states, which contain folder names of the machine.
NAMES = (*SAVED, "processor_config.json", INDEX)
# Files of an earlier push that stay if the folder has no such file; all others would not match the new weights.
KEPT = ("README.md", "config.json")
AGAIN = "Push the folder again."
MAX_LISTED = 8  # names in a message
logger = logging.getLogger(__name__)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    with_images: bool = False,
) -> str | None:
    """Upload a saved checkpoint as one commit: the repository then has all of it, or is unchanged.

    Files of a checkpoint are sent, by name; other files in the folder are not sent and are listed in a warning. Of an
    existing card in the repository, the sections and the front matter that people wrote are kept (see
    `handwritten.merge_cards`), as are files that do not belong to a checkpoint.

    Args:
        folder: A folder written by `save`.
        repo_id: "user/name"; created if it does not exist.
        private: The repository must be private; a new one is created private.
        revision: Branch to commit to, created from the default branch if it does not exist, or "refs/pr/N".
        commit_message: Message of the commit.
        create_pr: Open a pull request against the default branch instead of committing to it.
        token: Token of the Hub; default: the one stored by `hf auth login`.
        with_images: Also send clusters.png, and show it in the card: it contains some of your training images.
    Returns:
        Address of the commit, or of the pull request. Of several processes only the main one pushes; the others return
        None at once.
    Raises:
        FileNotFoundError: The folder is not a saved checkpoint, or lacks a shard that its index names.
        ValueError: A file of the folder is a link to outside, the id is not valid, both a revision and a pull request
            are requested, the repository is public but private is requested, the front matter of a card cannot be
            read, or the base's licence is unknown or forbids it and neither the record nor the card states another.
        ConnectionError: The Hub could not be reached, refused, or had another commit in the meantime.
    Example:
        >>> push("out", "user/resnet50.lfrns50", private=True)  # doctest: +SKIP
        'https://huggingface.co/user/resnet50.lfrns50/commit/...'
    """
    folder = Path(folder)
    call = f"push({str(folder)!r}, {repo_id!r})"
    if create_pr and revision is not None:
        raise ValueError(
            f"push(revision={revision!r}, create_pr=True): a pull request is opened against the default branch. "
            "Give only one of them."
        )
    settle(folder, _is_own)  # a killed save may not have done its last step
    own = _own_files(folder, call, with_images=with_images)
    files: dict[str, Path | bytes] = {path.name: path for path in own}
    if not _is_main_process():
        return None
    _refuse_unlicensed(folder, call)
    _name_others(folder, files.keys(), call)

    api = HfApi(token=token, library_name="lfrns_hub")
    with _one_message(call, api):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        head, has_branch = _find_head(api, repo_id, revision)
        there = {file.rfilename for file in head.siblings or []}
        card = None
        if "README.md" in there:
            card = Path(api.hf_hub_download(repo_id, "README.md", revision=head.sha)).read_text(encoding="utf-8-sig")
    if private and not head.private:
        raise ValueError(
            f"push({str(folder)!r}, {repo_id!r}, private=True): the repository exists and is public. Make it private "
            "in its settings, or push to another name."
        )

    if "README.md" in files:
        try:
            new = (folder / "README.md").read_text(encoding="utf-8")
            files["README.md"] = merge_cards(new if GALLERY in files else _without_gallery(new), card).encode()
        except ValueError as error:
            raise ValueError(f"{call}: {error}") from error
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
    gone = [name for name in sorted(there - files.keys()) if _is_own(name) and name not in KEPT]
    removals = [CommitOperationDelete(name) for name in gone]
    with _one_message(call, api, "If there is no new pull request, push the folder again." if create_pr else AGAIN):
        if not has_branch:
            api.preupload_lfs_files(repo_id, additions, free_memory=False)  # first: if it fails, no branch is created
            api.create_branch(repo_id, branch=revision, revision=head.sha, exist_ok=True)
        # Not upload_folder, which makes several commits of a folder.
        commit = api.create_commit(
            repo_id,
            [*removals, *additions],
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # the Hub refuses if there has been another commit since
        )
    return commit.pr_url or commit.commit_url


def collect(title: str, owner: str, repositories: Iterable[str], *, private: bool = False) -> str:
    """Put models into a collection of the Hub, which is created if there is none of this title; they stay there.

    Args:
        title: Title of the collection.
        owner: User or organisation that has it.
        repositories: Models, "user/name".
        private: A new collection is private.
    Returns:
        Address of the collection.
    Raises:
        ConnectionError: The Hub could not be reached, or refused.
    """
    api = HfApi(library_name="lfrns_hub")
    with _one_message(f"collect({title!r})", api, "Collect them again: what is there is not put in twice."):
        collection = api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        for repo_id in repositories:
            api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    return collection.url


def _refuse_unlicensed(folder: Path, call: str) -> None:
    """Refuse a checkpoint whose base lets nobody share it, unless a person states a licence on record or card."""
    config = read_json(folder / "config.json", call)
    args = config.get("model_args")
    kept_by_timm = args.get("slim") if isinstance(args, dict) else None  # its save_for_hf keeps no other key
    slim = config.get("slim") or kept_by_timm
    facts = {key: slim[key] for key in KEYS if slim.get(key)} if isinstance(slim, dict) else {}
    record, card = folder / "record.json", folder / "README.md"
    setup = read_json(record, call).get("setup") if record.is_file() else None
    stated = [setup.get("license")] if isinstance(setup, dict) else []
    try:
        front: Any = metadata_load(card) if card.is_file() else {}
    except Exception:  # YAML's many errors, which `merge_cards` tells below
        front = {}
    written = front.get("license") if isinstance(front, dict) else None
    stated += [written] if written != facts.get("license") else []
    if not any(isinstance(licence, str) and licence != UNKNOWN for licence in stated):
        refuse_unlicensed(facts, call, "lfrns push --license ID, as --license mit")


def _own_files(folder: Path, call: str, *, with_images: bool = False) -> list[Path]:
    """Return the files of a folder that belong to a checkpoint, by name, shards by their index.

    A link to outside the folder could send anything: only links of the Hub's own cache are followed.
    """
    needed = ["config.json", *_weights_of(folder, call)]
    for name in needed:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{call}: it has no {name}. Push a folder that lfrns_hub.save wrote.")
    others = set(NAMES) - {WEIGHTS, INDEX, *([] if with_images else [GALLERY])}
    files = [folder / name for name in sorted(others.union(needed)) if (folder / name).is_file()]
    home = folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in files:
        if not any(path.resolve().is_relative_to(one) for one in homes):
            raise ValueError(
                f"{call}: {path.name} is a link that leads out of the folder. Put the file itself there, or remove it."
            )
    return files


def _weights_of(folder: Path, call: str) -> list[str]:
    """Return the weight files of a folder: model.safetensors, else the index of shards and the shards that it names."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    shards = read_json(folder / INDEX, call).get("weight_map")
    shards = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    strange = next((name for name in shards if not SHARD.fullmatch(name)), None)
    if strange is not None or not shards:
        raise ValueError(
            f"{call}: {INDEX} names {short(strange or 'no file')}, where model-00001-of-00002.safetensors and the like "
            "are needed. Save the model again."
        )
    return [INDEX, *shards]


def _name_others(folder: Path, sent: Iterable[str], call: str) -> None:
    """Log a warning about files in a folder that are not sent."""
    others = sorted({path.name for path in folder.iterdir()} - set(sent))
    if GALLERY in others:
        logger.warning("%s: %s shows training images and is not sent; with_images=True (lfrns push: --with-images) "
                       "sends it.", call, GALLERY)  # fmt: skip
        others.remove(GALLERY)
    if others:
        more = f" and {len(others) - MAX_LISTED} more" if len(others) > MAX_LISTED else ""
        named = ", ".join(short(name) for name in others[:MAX_LISTED])
        logger.warning("%s: no part of a checkpoint and not sent: %s%s.", call, named, more)


def _without_gallery(card: str) -> str:
    """Remove the figure of clusters from a card that is sent without it."""
    return re.sub(rf"^!\[[^\]\n]*\]\({re.escape(GALLERY)}\)\n*", "", card, flags=re.MULTILINE)


def fetch(repo_id: str, *, revision: str | None = None) -> Path:
    """Download a checkpoint into the Hub's cache, or find it there, and compare it with the Hub's checksums.

    Args:
        repo_id: "user/name".
        revision: Branch, tag or commit.
    Returns:
        Folder of the snapshot.
    Raises:
        FileNotFoundError: Neither a folder nor the id of a visible repository.
        ConnectionError: The Hub cannot be reached or fails, and the checkpoint is not in the cache.
        ValueError: A file differs from the Hub's; the next call downloads it again.
    """
    call = f"load({repo_id!r})" if revision is None else f"load({repo_id!r}, revision={revision!r})"
    endpoint = HfApi().endpoint
    try:
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[*NAMES, "model-*-of-*.safetensors"], etag_timeout=5
            )
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{call}: neither a folder nor a Hub id of the form user/name.") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{call}: no such folder here, and {endpoint} cannot be reached. Give a local folder, "
            "or download the repository once while there is a network."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{call}: no such folder, and {endpoint} says: {_first_line(error)}. Check the name and the revision, or "
            "log in with `hf auth login` if it is private."
        ) from error
    except (TransportError, OSError) as error:
        raise ConnectionError(
            f"{call}: {endpoint} did not give all of it: {_first_line(error)}. Load it again: what has arrived is "
            "not downloaded twice."
        ) from error
    _refuse_damaged(folder, call)
    return folder


def _refuse_damaged(folder: Path, call: str) -> None:
    """Compare the LFS files of a snapshot with their SHA-256, and remove a wrong one from the cache.

    The client compares only sizes. Its cache names an LFS file by the SHA-256 in the repository's metadata, so this
    needs no network. (Without symbolic links the cache has no such name.)
    """
    for path in folder.iterdir():
        blob = path.resolve()
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            continue
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise ValueError(
                f"{call}: {path.name} is damaged: its SHA-256 is {found[:12]}..., the repository's is "
                f"{blob.name[:12]}.... It was taken out of the cache: load again to download it anew."
            )


def _find_head(api: HfApi, repo_id: str, revision: str | None) -> tuple[ModelInfo, bool]:
    """Return the commit that a push builds on, and whether the revision exists."""
    try:
        return api.model_info(repo_id, revision=revision), True
    except RevisionNotFoundError:
        return api.model_info(repo_id), False


@contextmanager
def _one_message(call: str, api: HfApi, again: str = AGAIN) -> Iterator[None]:
    """Convert any error of the client during a push into one."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{call}: {_first_line(error)}. A Hub id has the form user/name.") from error
    except (TransportError, OSError, RuntimeError, ValueError) as error:
        # The client wraps the cause of a failed upload in a RuntimeError, and cannot parse some servers' errors.
        origin = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(origin, "response", None), "status_code", None)
        way_out = {
            401: "Log in with `hf auth login`, then push the folder again.",
            403: "Log in with `hf auth login`, with a token that may write there, then push the folder again.",
            429: "Wait a few minutes, then push the folder again.",
        }.get(status, again)
        raise ConnectionError(
            f"{call}: {api.endpoint} did not take it: {_first_line(origin)}. The repository holds all of this push or "
            f"none of it. {way_out}"
        ) from error


def _is_main_process() -> bool:
    """Return whether this is the main process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # launched together, but the group does not exist yet


def _is_own(name: str) -> bool:
    """Return whether a file of a repository belongs to a checkpoint."""
    return name in NAMES or SHARD.fullmatch(name) is not None


def _first_line(error: BaseException) -> str:
    """Return the first line of the client's message and the server's message, or the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = getattr(error, "server_message", None)
    parts = [lines[0] if lines else type(error).__name__, *([said.strip()] if said else [])]
    return " ".join(parts).rstrip(".")
