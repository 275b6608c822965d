"""What every layout has in common: config.json, model.safetensors, the card, and how a finished folder is published."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfrns_hub.card import read_record, render_card
from lfrns_hub.checkpoint.remote_code import MODELING_FILE
from lfrns_hub.lineage import KEYS
from lfrns_hub.narrow import FORMAT_VERSION, computed_buffers, grown
from lfrns_hub.plots import plot_ladder, plot_widths, shows_plan

# Written last to first: a folder that is being overwritten has its new config only when the weights are there.
FILES = (
    "config.json",
    "README.md",
    "record.json",
    "widths.png",
    "clusters.png",
    "curve.png",
    "preprocessor_config.json",
    MODELING_FILE,
    "model.safetensors",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"load({str(folder)!r}): it has no config.json. Give a folder that lfrns_hub.save wrote.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "slim" not in config:  # timm's save_for_hf keeps no key but its own
        config["slim"] = (config.get("model_args") or {}).get("slim") or {}
    return config


def write_config(draft: Path, config: dict[str, Any], model: nn.Module) -> None:
    """Write config.json with what is known of the model's making."""
    config["slim"] = facts_of(model)
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def facts_of(model: nn.Module) -> dict[str, Any]:
    """Give what config.json says of a model's making."""
    provenance = getattr(model, "lfrns_base", {}) | (getattr(model, "lfrns_provenance", None) or {})
    return {**provenance, "format_version": FORMAT_VERSION, "class": type(model).__name__}


def state_base(draft: Path, stated: dict[str, str]) -> None:
    """Say in config.json which published weights the model comes from, in place of what was said before."""
    config = read_config(draft)
    config["slim"] = {key: value for key, value in config["slim"].items() if key not in KEYS} | stated
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(model: nn.Module, draft: Path) -> None:
    """Write model.safetensors under the module's own names, each tensor by itself."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def check_tensors(expected: dict[str, Tensor], folder: Path) -> None:
    """Compare names and shapes of a skeleton with those in the file's header, before anything is allocated."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    if not found:
        raise ValueError(f"load({str(folder)!r}): it has no model.safetensors. Pickled weights are not read.")
    check_shapes({name: list(tensor.shape) for name, tensor in expected.items()}, found, folder)


def check_shapes(expected: dict[str, list[int]], found: dict[str, list[int]], folder: Path) -> None:
    """Refuse tensors that are missing, unexpected or misshapen."""
    problems = [f"{n} is missing" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{n} is unexpected" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n} has shape {found[n]}, the config says {expected[n]}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"load({str(folder)!r}): {'; '.join(problems[:4])}{more}. Save the model again.")


def compare(model: nn.Module, loaded: nn.Module) -> None:
    """Refuse a checkpoint that does not come back as it was, buffers outside the file included."""
    state, again, computed = _tensors(model), _tensors(loaded), computed_buffers(model)
    for name, tensor in state.items():
        other = again.get(name)
        if name in computed and other is not None and grown(tensor, other):
            continue
        if other is None or not torch.equal(_plain(tensor), _plain(other)):
            raise ValueError(
                f"save({type(model).__name__}): {name} does not come back as it was. Give the architecture it was cut "
                "from by base= and base_args=."
            )


def match_dtype(model: nn.Module, folder: Path) -> nn.Module:
    """Give the model the file's floating-point type, where it has one for all."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()} - {"I64", "I32", "BOOL", "U8"}
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    return model.to(types[kind]) if len(kinds) == 1 and (kind := kinds.pop()) in types else model


def write_card(draft: Path, record: Any, directory: Path, *, base: str, library: str) -> None:
    """Write README.md, record.json and the pictures of widths and budgets; take along one of this plan's clusters.

    Args:
        draft: The folder, with its config.json and, where there is one, its preprocessor_config.json.
        record: The Record, its dict, or None.
        directory: Where the draft will go; the model has its name where the record does not say.
        base: The dense architecture.
        library: Which library builds it: timm, transformers or pytorch.
    """
    config = read_config(draft)
    facts, record = config["slim"], read_record(record)
    setup = (record or {}).get("setup") or {}
    if record is not None:
        (draft / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    has_plot = bool(facts.get("widths"))
    if has_plot:
        plot_widths(facts, draft / "widths.png")
    gallery = directory / "clusters.png"
    has_gallery = shows_plan(gallery, facts.get("plan") or {})
    if has_gallery:
        shutil.copyfile(gallery, draft / gallery.name)
    budgets, dense = setup.get("budgets") or [], (record or {}).get("dense") or {}
    has_curve = len(budgets) > 1 and all(one.get("top1_pct") is not None for one in [*budgets, dense])
    if has_curve:
        points = [{**one, "macs_g": one["macs_fraction"] * dense["macs_g"]} for one in budgets]
        plot_ladder(points, dense, draft / "curve.png")
    card = render_card(
        record,
        model_name=setup.get("model_name") or directory.name,
        base=base,
        provenance=facts,
        library=library,
        plot="widths.png" if has_plot else None,
        gallery=gallery.name if has_gallery else None,
        curve="curve.png" if has_curve else None,
        processor=True if (draft / "preprocessor_config.json").is_file() else None,
        remote_code="auto_map" in config,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def publish(draft: Path, directory: Path) -> None:
    """Move a finished draft into place; files in the folder that are not a checkpoint's stay."""
    if not directory.exists() or not any(directory.iterdir()):
        draft.replace(directory)
        return
    new = {path.name for path in draft.iterdir()}
    for name in [*FILES, "model.safetensors.index.json"]:
        if name not in new:
            (directory / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda n: FILES.index(n) if n in FILES else len(FILES), reverse=True):
        (draft / name).replace(directory / name)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """List what a model holds: its state, and the buffers that are kept out of it."""
    return dict(model.named_buffers()) | model.state_dict()


def _plain(tensor: Tensor) -> Tensor:
    """Bring a tensor to where any two can be compared, NaN equal to NaN."""
    tensor = tensor.detach().cpu()
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor
