"""To the Hub and from it: the one place that speaks huggingface_hub's HTTP."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# Root of the client's HTTP errors, by way of one of them: the library under huggingface_hub changes between versions.
TransportError = HfHubHTTPError.__bases__[0]
# What a checkpoint consists of: no pickle goes up or comes down.
OURS = ("*.json", "*.safetensors", "*.md", "*.png", "modeling_lfrns.py")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Upload a saved checkpoint as one commit: all of its files or none.

    Args:
        folder: What `save` wrote.
        repo_id: "user/name"; made if it is not there.
        private: Whether a new repository is private.
        revision: Branch to commit to, made if it is not there; the default branch otherwise.
        commit_message: What the commit says.
        create_pr: Open a pull request instead of committing to the branch.
        token: Of the Hub; by default the one that `hf auth login` stored.
    Returns:
        Address of the commit, or of the pull request.
    Raises:
        FileNotFoundError: The folder is not a saved checkpoint.
        ConnectionError: The Hub could not be reached or refused.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"push({str(folder)!r}): it has no {name}. Push a folder that lfrns_hub.save wrote."
            )
    api = HfApi(token=token, library_name="lfrns_hub")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            create_pr=create_pr,
            allow_patterns=list(OURS),
            ignore_patterns=["*/*"],  # a recipe's work/ stays at home
        )
    except HFValidationError as error:
        raise ValueError(f"push(repo_id={repo_id!r}): {error}") from error
    except (TransportError, OSError) as error:
        raise ConnectionError(
            f"push({str(folder)!r}, {repo_id!r}): {api.endpoint} did not take it: {_first_line(error)}. Nothing is "
            "lost: log in with `hf auth login` if it asks for that, then push the folder again."
        ) from error
    return commit.pr_url if create_pr and commit.pr_url else commit.commit_url


def fetch(repo_id: str, *, revision: str | None = None) -> Path:
    """Download a checkpoint into the Hub's cache, or find it there.

    Args:
        repo_id: "user/name".
        revision: Branch, tag or commit.
    Returns:
        Folder of the snapshot.
    Raises:
        FileNotFoundError: Neither a folder nor an id of a repository that can be seen.
        ConnectionError: The Hub cannot be reached and the cache does not hold it.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(OURS), etag_timeout=5))
    except HFValidationError as error:
        raise FileNotFoundError(f"load({repo_id!r}): neither a folder nor a Hub id of the form user/name.") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"load({repo_id!r}): no such folder here, and {HfApi().endpoint} cannot be reached. Give a local folder, "
            "or download the repository once while there is a network."
        ) from error
    except TransportError as error:
        raise FileNotFoundError(
            f"load({repo_id!r}, revision={revision!r}): no such folder, and {HfApi().endpoint} says: "
            f"{_first_line(error)}. Check the name, or log in with `hf auth login` if it is private."
        ) from error


def _first_line(error: Exception) -> str:
    """Give the last line of the client's message that says something, or the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
