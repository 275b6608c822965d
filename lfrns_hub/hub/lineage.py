"""Origin of published weights: the Hub id of the dense model, its licence, and whether that lets others share it."""

import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download, hf_hub_url, metadata_load

from lfrns_hub.format.untrusted import read_json, short
from lfrns_hub.hub.reach import CONNECT_TIMEOUT_S, cached, reach_hub

UNKNOWN = "unknown"  # licence of a base that states none; a model without a base has no such entry
NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")  # in the identifiers of Creative Commons
KEYS = ("base_model", "license", "license_name", "license_link")
# Licences named by timm for which the Hub has an identifier; it refuses a card with any other.
HUB_LICENSES = {
    "apache-2.0",
    "apple-amlr",
    "apple-ascl",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "fair-noncommercial-research-license",
    "gemma",
    "mit",
}


def base_facts(name: str) -> dict[str, str]:
    """Return the origin and the licence of published weights, as their publisher states them.

    Args:
        name: A timm name with weights ("resnet50.a1_in1k"), a Hub id ("user/name", "hf-hub:user/name@revision"), or a
            folder (with or without "local-dir:"), whose README.md is read.
    Returns:
        The known ones of `base_model` (Hub id) and `license` (the Hub's identifier, or "other" with a `license_name`
        and perhaps a `license_link`). Unknown ones are left out, also if the Hub cannot be reached within seconds.
    Raises:
        ValueError: Neither a timm name, a Hub id nor a folder.

    Example:
        >>> base_facts("resnet50.a1_in1k")
        {'base_model': 'timm/resnet50.a1_in1k', 'license': 'apache-2.0'}
    """
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        return _stated(folder / "README.md")
    repo_id = re.sub(r"^hf[-_]hub:", "", name).partition("@")[0]
    timm_name = repo_id.removeprefix("timm/")
    if timm.is_model(timm_name):
        cfg = timm.get_pretrained_cfg(timm_name) if timm.is_model_pretrained(timm_name) else None
        found = {"base_model": cfg.hf_hub_id, **_license(cfg.license)} if cfg else {}
        return {key: value for key, value in found.items() if value}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        return _stated(_fetch_card(repo_id), repo_id) | {"base_model": repo_id}
    raise ValueError(
        f"base_model={name!r}: neither a timm name, a Hub id (user/name) nor a folder. Name the weights that the dense "
        "model was loaded from, or leave it out: the card then says unknown."
    )


def facts_of_base(name: str) -> dict[str, str]:
    """Return `base_facts` of weights that are somebody's: where no licence is known, that it is UNKNOWN.

    Of a checkpoint that lfrns_hub wrote to a folder, these are the facts of its own base, if it has one.

    Raises:
        ValueError: As for `base_facts`.
    """
    config = Path(name.removeprefix("local-dir:")) / "config.json"
    if config.is_file() and isinstance(slim := read_json(config, f"base_model={name!r}").get("slim"), dict):
        return {key: slim[key] for key in KEYS if isinstance(slim.get(key), str)}
    return {"license": UNKNOWN} | base_facts(name)


def refuse_unlicensed(facts: dict[str, Any], call: str, option: str = "--license ID, as --license mit") -> None:
    """Refuse to share a model that comes from others' weights, where their licence is unknown or forbids it.

    Args:
        facts: Those of its base by `base_facts`, perhaps with UNKNOWN as the licence; of a model without a base, none.
        call: The user's call, for the error.
        option: How a licence is stated there.
    Raises:
        ValueError: The base has no licence, one that allows no derivatives, or one without an identifier or a link.
    """
    base, licence = facts.get("base_model"), facts.get("license")
    if base is None and licence is None:
        return
    named = short(base or "the base of this model")
    if not isinstance(licence, str) or licence == UNKNOWN:
        problem = f"{named} states no licence, and without one nothing made of it may be shared"
    elif NO_DERIVATIVES.search(licence):
        problem = f"{named} has the licence {short(licence)}, which allows nobody to share what is made of it"
    elif licence == "other" and not facts.get("license_link"):
        problem = f"{named} has the licence {short(facts.get('license_name') or licence)}, whose terms are not linked"
    else:
        return
    raise ValueError(f"{call}: {problem}. If you may share this model, say under which licence: {option}.")


def _license(timm_license: str | None) -> dict[str, str]:
    """Translate timm's name of a licence to the Hub's."""
    if not timm_license or timm_license == UNKNOWN:
        return {}
    known = timm_license in HUB_LICENSES
    return {"license": timm_license} if known else {"license": "other", "license_name": timm_license}


def _fetch_card(repo_id: str) -> Path | None:
    """Return a model's card from the cache or the Hub; None if there is none or the Hub is out of reach."""
    try:
        if (path := cached(repo_id, "README.md")) is None:
            reach_hub(f"the card of {repo_id}")
            path = Path(hf_hub_download(repo_id, "README.md", etag_timeout=CONNECT_TIMEOUT_S))
    except Exception:  # any of the client's dozen errors: without a card the licence is unknown
        return None
    return path


def _stated(card: Path | None, repo_id: str | None = None) -> dict[str, str]:
    """Read a card's front matter, if possible; a link to a file refers to the card's repository."""
    if card is None or not card.is_file():
        return {}
    try:
        front: Any = metadata_load(card) or {}
    except Exception:  # invalid YAML states nothing
        return {}
    stated = {key: front[key] for key in KEYS if isinstance(front.get(key), str) and front[key] != UNKNOWN}
    if stated.get("license") != "other":  # a licence with an identifier needs no name and no link
        stated = {key: value for key, value in stated.items() if key in ("base_model", "license")}
    link = stated.pop("license_link", "")
    if "://" not in link:  # a file next to that card, not next to ours
        link = hf_hub_url(repo_id, link) if repo_id and link else ""
    return stated | ({"license_link": link} if link else {})
