"""Whether the Hub can be reached: detected within seconds, reported in one message."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

# A server that exists answers a HEAD faster than this; a missing one must be detected within seconds.
CONNECT_TIMEOUT_S = 5.0
OFFLINE_OPTIONS = (
    "Two options need no network: --model FOLDER, a local model (or --weights FILE with a timm name), "
    "and --data-dir FOLDER, local images (lfrns: --data)."
)


def cached(repo_id: str, filename: str = "config.json") -> Path | None:
    """Return the path of a Hub file in the local cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        return None
    path = try_to_load_from_cache(repo_id, filename)
    return Path(path) if isinstance(path, str) else None


def address_of(repo_id: object) -> str | None:
    """Return the address of a repository's page; None for what is no id of the form user/name."""
    from huggingface_hub import constants

    is_id = isinstance(repo_id, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII)
    return f"{constants.ENDPOINT}/{repo_id}" if is_id else None


def repository_of(url: str) -> str | None:
    """Return the repository, user/name, of a commit's address; None for any other."""
    from huggingface_hub import constants

    found = re.fullmatch(r"/(\w[\w.-]*/\w[\w.-]*)/commit/\w+", url.removeprefix(constants.ENDPOINT), re.ASCII)
    return found[1] if found else None


def reach_hub(what: str) -> None:
    """Raise an error within seconds if the Hub is out of reach; its own client would retry for a minute."""
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        huggingface_hub.get_session().head(endpoint, timeout=CONNECT_TIMEOUT_S)
    except Exception as error:  # httpx has a dozen error types; with any of them nothing can be fetched
        raise ConnectionError(f"could not reach {endpoint} for {what} ({error}). {OFFLINE_OPTIONS}") from error


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Convert errors of the Hub's client into one message."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise ConnectionError(f"could not fetch {what} from the Hub. {OFFLINE_OPTIONS}") from error
        raise ValueError(f"the Hub does not have {what}, or not for you. Check the name, or log in.") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the Hub refused {what} ({str(error).splitlines()[0]}). {OFFLINE_OPTIONS}") from error
