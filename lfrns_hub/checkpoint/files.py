"""Files common to all layouts: config.json, model.safetensors, the card; and how a finished folder is published."""

import json
import logging
import os
import shutil
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfrns_hub.checkpoint.narrow_classes import own_names
from lfrns_hub.checkpoint.remote_code import MODELING_FILE
from lfrns_hub.format.narrow import FORMAT_VERSION, computed_buffers, short
from lfrns_hub.format.untrusted import AGAIN, MAX_JSON_BYTES, read_headers, read_json, read_weights, without_code
from lfrns_hub.hub.card import read_record, render_card
from lfrns_hub.hub.handwritten import merge_cards
from lfrns_hub.hub.lineage import KEYS
from lfrns_hub.hub.push import INDEX, SAVED
from lfrns_hub.measure import comparable_budgets, comparable_dense, main_figure
from lfrns_hub.method.provenance import check_provenance, provenance_of
from lfrns_hub.plots import plot_ladder, plot_widths, shows_plan

logger = logging.getLogger(__name__)

REPLACED = ("config.json", "model.safetensors", "README.md", "record.json", "preprocessor_config.json")
KINDS = {
    **dict.fromkeys(("slim", "model_args", "pretrained_cfg", "lfrns"), dict),
    **dict.fromkeys(("architecture", "model_type"), str),
    "num_classes": int,
    "label_names": list,
}
# Dtypes, by safetensors' names, in which a model's floating-point and other tensors may be stored.
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
OTHERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json; `slim`, which records how the model was made, is always a dict of the right types."""
    call = f"load({str(folder)!r})"
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{call}: it has no config.json. Give a folder that lfrns_hub.save wrote.")
    config = read_json(path, call)
    args = config.get("model_args")
    if "slim" not in config:  # timm's save_for_hf keeps only its own keys
        config["slim"] = args.get("slim") if isinstance(args, dict) else None
    config["slim"] = config["slim"] or {}
    for key, kind in KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise ValueError(f"{call}: config.json has {key} = {short(config[key])}, a {kind.__name__} is needed. "
                             f"{AGAIN}")  # fmt: skip
    check_provenance(config["slim"], call)
    return config


def write_config(draft: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Write config.json with the provenance of the model, and without foreign code."""
    ours = own_names(config.get("auto_map"))
    config = {**without_code(config), **({"auto_map": ours} if ours else {}), "slim": facts_of(model)}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def facts_of(model: nn.Module) -> dict[str, Any]:
    """Return the provenance of a model for config.json."""
    provenance = getattr(model, "lfrns_base", {}) | provenance_of(model)
    return {**provenance, "format_version": FORMAT_VERSION, "class": type(model).__name__}


def state_base(draft: Path, stated: dict[str, str]) -> None:
    """State in config.json which published weights the model comes from, replacing earlier statements."""
    config = read_config(draft)
    config["slim"] = {key: value for key, value in config["slim"].items() if key not in KEYS} | stated
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(model: nn.Module, draft: Path) -> None:
    """Write model.safetensors with the module's own names, each tensor separately."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def read_tensors(expected: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Read the weights of a skeleton, if names, shapes and dtypes in the header match the skeleton's.

    Args:
        expected: The skeleton's state dict, on any device including meta.
        folder: Folder of the checkpoint.
    Returns:
        The tensors, on the CPU, by name.
    Raises:
        ValueError: A tensor is missing, unexpected, misshapen or of another dtype; nothing has been allocated by then.
    """
    found = read_headers(folder, f"load({str(folder)!r})")
    check_shapes(
        {name: list(tensor.shape) for name, tensor in expected.items()},
        {name: header.shape for name, header in found.items()},
        folder,
    )
    for name, header in found.items():
        if header.dtype not in (FLOATS if expected[name].is_floating_point() else OTHERS):
            raise ValueError(
                f"load({str(folder)!r}): {name} is stored as {short(header.dtype)}, the model has "
                f"{expected[name].dtype}. Save the model again."
            )
    files = sorted({header.file for header in found.values()})
    return {name: tensor for path in files for name, tensor in read_weights(path, f"load({str(folder)!r})").items()}


def check_shapes(expected: dict[str, list[int]], found: dict[str, list[int]], folder: Path) -> None:
    """Refuse tensors that are missing, unexpected or misshapen."""
    problems = [f"{short(n)} is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{short(n)} is unexpected" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{short(n)} has shape {short(found[n])}, the config says {short(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"load({str(folder)!r}): {'; '.join(problems[:4])}{more}. Save the model again.")


def compare(model: nn.Module, loaded: nn.Module) -> None:
    """Refuse a checkpoint that loads with different tensors, including buffers that are not in the file."""
    state, again, computed = _tensors(model), _tensors(loaded), computed_buffers(model)
    for name, tensor in state.items():
        other = again.get(name)
        if name in computed and other is not None and tensor.shape != other.shape:
            continue  # the forward computes it for its images
        if other is None or not torch.equal(_plain(tensor), _plain(other)):
            raise ValueError(
                f"save({type(model).__name__}): {name} does not come back as it was. Give the architecture it was cut "
                "from by base= and base_args=."
            )


def match_dtype(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Convert the model to the floating-point dtype of the loaded tensors, if they have a single one."""
    kind = only_dtype(tensors)
    return model.to(kind) if kind else model


def only_dtype(tensors: dict[str, Tensor]) -> torch.dtype | None:
    """Return the floating-point dtype of tensors, None if there are several."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


def write_card(draft: Path, record: Any, directory: Path, *, name: str, base: str, library: str) -> None:
    """Write README.md, record.json and the plots of widths and budgets; keep a plot of this plan's clusters.

    Args:
        draft: The folder, with its config.json and, if there is one, its preprocessor_config.json.
        record: The Record, its dict, or None.
        directory: Destination of the draft: its clusters plot and the sections that people wrote in its card are kept.
        name: Name of the model, if the record does not state it.
        base: The dense architecture.
        library: The library that builds it: timm, transformers or pytorch.
    """
    config = read_config(draft)
    facts, record = config["slim"], read_record(record)
    setup = (record or {}).get("setup") or {}
    budgets, dense = comparable_budgets(record or {}), comparable_dense(record or {})
    if record is not None:
        (draft / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    can_draw = find_spec("matplotlib") is not None
    if not can_draw:
        logger.warning("The card of %s has no pictures: matplotlib is not installed.", directory)
    has_plot = can_draw and bool(facts.get("widths"))
    if has_plot:
        plot_widths(facts, draft / "widths.png")
    gallery = directory / "clusters.png"
    has_gallery = not gallery.is_symlink() and shows_plan(gallery, facts.get("plan") or {})
    if has_gallery:
        shutil.copyfile(gallery, draft / gallery.name)
    key = main_figure(dense).key
    has_curve = can_draw and len(budgets) > 1 and all(one.get(key) is not None for one in [*budgets, dense])
    if has_curve:
        points = [{**one, "macs_g": one["macs_fraction"] * dense["macs_g"]} for one in budgets]
        plot_ladder(points, dense, draft / "curve.png", title=f"{base}: slimmed to several budgets", setup=setup)
    try:
        card = render_card(
            record,
            model_name=setup.get("model_name") or name,
            base=base,
            provenance=facts,
            library=library,
            plot="widths.png" if has_plot else None,
            gallery=gallery.name if has_gallery else None,
            curve="curve.png" if has_curve else None,
            processor=True if (draft / "preprocessor_config.json").is_file() else None,
            remote_code="auto_map" in config,
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"save({str(directory)!r}, record): no card can be written of it ({type(error).__name__}: "
            f"{short(str(error), 200)}). Measure the model again by lfrns_hub.measure, and remove an old record.json."
        ) from error
    card = merge_cards(card, earlier_card(directory), local=True)
    (draft / "README.md").write_text(card, encoding="utf-8", errors="surrogateescape")


def earlier_card(directory: Path) -> str | None:
    """Return the card of one of our checkpoints in a folder; None where there is none."""
    readme = directory / "README.md"
    if readme.is_symlink() or not readme.is_file() or not holds_ours(directory):  # a link could point to any secret
        return None
    size = readme.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"save({str(directory)!r}): README.md there has {size:,} bytes, at most {MAX_JSON_BYTES:,} are "
            "read. Remove it."
        )
    return readme.read_text(encoding="utf-8-sig", errors="surrogateescape")


def is_own(name: str) -> bool:
    """Return whether `save` writes or replaces a file of this name in a checkpoint's folder."""
    return name in (*SAVED, INDEX) or fnmatch(name, "model-*-of-*.safetensors")


def refuse_foreign(directory: Path, call: str) -> None:
    """Refuse to replace files that no checkpoint or run of ours wrote.

    Raises:
        FileExistsError: There are such files; the message names some.
    """
    replaced = [name for name in REPLACED if os.path.lexists(directory / name)]
    if replaced and not holds_ours(directory):
        raise FileExistsError(
            f"{call}: {str(directory)!r} holds {', '.join(replaced)} and no checkpoint or run of lfrns_hub. Nothing of "
            "others is replaced: name another folder, or remove them first."
        )


def holds_ours(directory: Path) -> bool:
    """Return whether a folder has a checkpoint that `save` wrote, perhaps damaged, or the run of a recipe."""
    for path in (directory / "config.json", directory / "record.json"):
        if path.is_file():
            with path.open("rb") as file:
                if b"lfrns" in file.read(MAX_JSON_BYTES):  # every config or, of a dense model, the record has this word
                    return True
    return (directory / MODELING_FILE).is_file() or (directory / "work" / "run.json").is_file()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model: its state dict, and its non-persistent buffers."""
    return dict(model.named_buffers()) | model.state_dict()


def _plain(tensor: Tensor) -> Tensor:
    """Move a tensor to the CPU for comparison, with NaN replaced so that it equals NaN."""
    tensor = tensor.detach().cpu()
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor
