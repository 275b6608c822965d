"""Resolution of names: a model of timm or transformers, a folder, a repository on the Hub, or a function."""

import difflib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lfrns_hub.format.memory import OverBudget, bounded, bytes_for
from lfrns_hub.format.untrusted import read_json, refuse_large
from lfrns_hub.hub.reach import CONNECT_TIMEOUT_S, cached, hub_errors, reach_hub

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
MAX_TENSORS = 1 << 16  # of a dense model, whose weights may be in a format whose header is not read


def resolve(name: str) -> tuple[str, str]:
    """Return a name's builder ("timm", "transformers", "function") and its source: a timm name, a folder, a repo id."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name!r}: the folder has no config.json. Give a folder saved by timm.")
        return "timm", name
    if re.match(r"hf[-_]hub:", name):
        repo_id = name.split(":", 1)[1]
        _hub_config(repo_id)
        return "timm", f"hf-hub:{repo_id}"
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return "function", name
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.is_file():
            raise ValueError(f"model {name!r}: the folder has no config.json. Give a folder of timm or transformers.")
        kind = _kind_of(read_json(path, f"model {name!r}"), name)
        return kind, f"local-dir:{name}" if kind == "timm" else name
    if timm.is_model(name):
        if "." in name:
            try:
                timm.get_pretrained_cfg(name, allow_unregistered=False)
            except RuntimeError as error:
                stem = name.split(".", 1)[0]
                tags = timm.list_pretrained(f"{stem}.*")
                near = _near(name, tags) or f"Give {', '.join(tags[:4]) or 'the name alone'}."
                raise ValueError(f"model {name!r}: {stem} has no such weights. {near}") from error
        return "timm", name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        kind = _kind_of(_hub_config(name), name)
        return kind, f"hf-hub:{name}" if kind == "timm" else name
    raise ValueError(
        f"model {name!r}: neither timm nor a folder here has it. {_near(name, timm.list_models())}"
        "Else give a Hub repo id (user/name), a folder, or package.module:function."
    )


def _near(name: str, names: list[str]) -> str:
    """Return near matches of a misspelt name."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"Near matches: {', '.join(near)}. " if near else ""


def _kind_of(config: dict[str, Any], name: str) -> str:
    """Return the library of a config.json."""
    if "architecture" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    raise ValueError(f"model {name!r}: its config.json names neither an architecture (timm) nor a model_type.")


def _hub_config(repo_id: str) -> dict[str, Any]:
    """Read a Hub model's config.json, from the cache if it is there."""
    repo_id, _, revision = repo_id.partition("@")
    path = None if revision else cached(repo_id)
    if path is None:
        from huggingface_hub import hf_hub_download

        reach_hub(f"the model {repo_id}")
        with hub_errors(f"the model {repo_id}"):
            options = {"revision": revision or None, "etag_timeout": CONNECT_TIMEOUT_S}
            path = Path(hf_hub_download(repo_id, "config.json", **options))
    return read_json(path, f"model {repo_id!r}")


def read_config(source: str) -> Any:
    """Read a transformers config; code in its repository is not run."""
    from transformers import AutoConfig

    with hub_errors(f"the model {source}"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def refuse_oversized(kind: str, source: str, call: str) -> None:
    """Refuse a dense model whose config, in a folder or in the Hub's cache, needs more memory than its weights justify.

    Without weights, only sizes that no weights could have are refused: the caller named the model.
    """
    place = source.removeprefix("local-dir:").removeprefix("hf-hub:")
    path = Path(place) / "config.json" if Path(place).is_dir() else cached(place)
    if kind == "function" or path is None:
        return
    from transformers import AutoModelForImageClassification

    config = read_json(path, call)
    files = [file for ending in WEIGHTS for file in path.parent.glob(f"*{ending}")]
    size = sum(file.stat().st_size for file in files)
    labels = {key: config[key] for key in ("num_labels", "num_classes") if key in config}
    refuse_large(labels, f"{call}: config.json")
    try:
        with bounded(MAX_TENSORS, bytes_for(size, dense=bool(files)), dense=bool(files)), torch.device("meta"):
            if kind == "timm":
                timm.create_model(f"local-dir:{path.parent}", pretrained=False)
            else:
                AutoModelForImageClassification.from_config(read_config(str(path.parent)))
    except OverBudget as error:
        raise ValueError(f"{call}: {error}") from error
    except Exception:  # the library raises the same error where it builds the model
        return


def call_builder(name: str, num_classes: int | None) -> nn.Module:
    """Call "package.module:function", with num_classes if it has this parameter."""
    module_name, function_name = name.split(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not search the working directory
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model {name!r}: cannot import it ({error}). Run where `import {module_name}` works."
        ) from error
    takes = inspect.signature(function).parameters
    accepts = "num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    options = {"num_classes": num_classes} if num_classes is not None and accepts else {}
    model = function(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: the call gave a {type(model).__name__}, not a torch.nn.Module.")
    return model
