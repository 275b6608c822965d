"""`save` and `load`: write a model as a folder that loads again, and load it.

No layout overrides a forward: the stock model is built from its config, then narrowed by the stored sizes.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from lfrns_hub.checkpoint.files import (
    FORMAT_VERSION,
    compare,
    is_own,
    read_config,
    refuse_foreign,
    state_base,
    write_card,
)
from lfrns_hub.checkpoint.kinds import kind_of
from lfrns_hub.checkpoint.own import fill_own, narrow_as_stored, own_skeleton, prepare_as_stored, write_own
from lfrns_hub.checkpoint.stock import write_stock, write_stock_card
from lfrns_hub.checkpoint.timm import TIMM_NAME, carry_timm, load_timm, timm_base, write_timm
from lfrns_hub.checkpoint.timm_wrapper import (
    base_of,
    carry_wrapper,
    is_wrapper,
    load_wrapper,
    write_wrapper,
)
from lfrns_hub.checkpoint.transformers import (
    TYPE_PREFIX,
    carry_base,
    carry_transformers,
    fill_transformers,
    has_narrow_class,
    is_narrow_base,
    is_transformers,
    load_transformers,
    write_transformers,
)
from lfrns_hub.format.narrow import carry_facts, short
from lfrns_hub.format.untrusted import refusing
from lfrns_hub.hub import fetch
from lfrns_hub.hub.lineage import facts_of_base
from lfrns_hub.model_io.model import unwrap
from lfrns_hub.pictures import find_processor, write_processor
from lfrns_hub.runs import draft_of, entries, locked, put_in_place, settle
from lfrns_hub.runs.forked import one_thread_if_forked

logger = logging.getLogger(__name__)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    record: Any = None,
    base: str | nn.Module | Callable[..., nn.Module] | None = None,
    base_args: dict[str, Any] | None = None,
    base_model: str | None = None,
    processor: Any = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
    stock: bool = False,
) -> Path:
    """Write a model as a folder that loads again: config.json, model.safetensors, README.md, a plot.

    Everything is written next to the folder, loaded from there and compared tensor by tensor; then the folder changes
    in one step, so that a process killed at any moment leaves the old checkpoint or the new one.

    Args:
        model: A slim (or dense) model: timm's, a transformers image classifier, or a custom class. Wrappers of
            torch.compile and DDP are removed.
        directory: Destination; other files in it are not changed. A clusters.png of this plan is shown in the card, one
            of another plan is removed. Of an existing card, the sections and front matter that people wrote are kept
            (see `handwritten.merge_cards`).
        record: The Record (or its dict) for the card and record.json. None: the card says "not measured".
        base: The dense architecture, if the model does not state it: a timm name, or for a custom class (and a
            transformers model that is not an image classifier) the dense model or a function that builds it.
        base_args: Arguments of the base that differ from its defaults.
        base_model: Origin of the dense model's weights, for the card: a timm name with weights, a Hub id or a folder.
            Its licence is looked up, for a few seconds at most. None: as loaded by `zoo.create_dense` or stated by an
            earlier save; otherwise the card says "unknown".
        processor: A transformers image processor, saved with the model. None: the one that a transformers model was
            loaded with, as changed by `set_preprocessing`.
        label_names: Name of each class, in the order of the logits.
        overwrite: Replace an existing checkpoint. Files of the same names that no checkpoint or run of lfrns_hub wrote
            are not replaced.
        stock: Write a dense model in the layout of its own library, which opens it without this package, and `slim`'s
            commands as a dense model; of a custom class the weights alone. base, base_args and base_model are not read.
    Returns:
        The folder.
    Raises:
        FileExistsError: The folder is not empty and overwrite is False, or it has other people's files, or it is a
            file.
        BlockingIOError: Another process is writing to it.
        OSError: It cannot be written; the earlier files are still there.
        ValueError: The model does not match its base, or does not load equal; base_model is not such a name.

    Example:
        >>> lfrns.save(timm.create_model("cifar_resnet20"), "saved").name
        'saved'
    """
    options = {"base": base, "base_args": base_args, "base_model": base_model, "processor": processor}
    options |= {"label_names": label_names, "overwrite": overwrite, "stock": stock}
    with prepared(model, directory, record=record, **options) as draft:
        with _told(f"save({str(directory)!r})"):
            put_in_place(draft, Path(os.path.realpath(directory)), is_own)
    return Path(directory)


@contextmanager
def prepared(
    model: nn.Module,
    directory: str | Path,
    *,
    record: Any = None,
    base: str | nn.Module | Callable[..., nn.Module] | None = None,
    base_args: dict[str, Any] | None = None,
    base_model: str | None = None,
    processor: Any = None,
    label_names: Sequence[str] | None = None,
    overwrite: bool = False,
    stock: bool = False,
) -> Iterator[Path]:
    """Do all steps of `save` except the last, and remove the draft at the end.

    Before training it proves that the trained model can be saved; until then it reserves the space on disk, and locks
    the folder against other processes.

    Args:
        model, directory, record, base, base_args, base_model, processor, label_names, overwrite,
            stock: As for `save`.
    Yields:
        The folder, next to `directory`, that holds the checkpoint.
    Raises:
        ValueError, OSError: As for `save`.
    """
    model = unwrap(model, "save")
    call = f"save({str(directory)!r})"
    named, directory = Path(directory), Path(os.path.realpath(directory))
    with one_thread_if_forked(), locked(directory, call):
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(f"{call}: it exists and is a file. Name a folder, or a new name.")
        if directory.exists() and entries(directory):
            if not overwrite:
                raise FileExistsError(f"{call}: it exists and is not empty. Pass overwrite=True or a new name.")
            refuse_foreign(directory, call)
        if label_names is not None and len(label_names) != (classes := _num_classes(model)) and classes:
            raise ValueError(
                f"save(label_names of {len(label_names)}): the model has {classes} classes. Name each one."
            )
        stated = None if base_model is None or stock else facts_of_base(base_model)
        with draft_of(directory) as draft:
            with _told(call):
                source = (
                    write_stock(model, draft, label_names)
                    if stock
                    else _write(model, draft, base, base_args, label_names)
                )
                processor = _own_processor(model) if processor is None else processor
                if processor is not None:
                    write_processor(processor, draft)
                if stated is not None:
                    state_base(draft, stated)
                source["name"] = named.name or directory.name
                if stock:
                    write_stock_card(draft, record, directory, model, **source)
                else:
                    write_card(draft, record, directory, **source)
            yield draft


def _write(
    model: nn.Module, draft: Path, base: Any, base_args: dict[str, Any] | None, label_names: Sequence[str] | None
) -> dict[str, str]:
    """Write config.json and weights, and compare them with what loads again; return the base's name and library."""
    if is_wrapper(model):
        name = base_of(model, base)
        write_wrapper(model, draft, name, base_args, label_names)
        source = {"base": name, "library": "timm"}
        compare(model, load(draft))
    elif is_transformers(model) and (base is None or has_narrow_class(model)):
        write_transformers(model, draft, label_names)
        source = {"base": type(model).__name__.removeprefix("Lfrns"), "library": "transformers"}
        compare(model, load(draft))
    elif (name := timm_base(model, base)) is not None:
        write_timm(model, draft, name, base_args, label_names)
        source = {"base": name, "library": "timm"}
        compare(model, load(draft))
    else:
        skeleton = own_skeleton(base, base_args)
        write_own(model, draft, skeleton, label_names)
        source = {"base": type(model).__name__, "library": "pytorch"}
        if skeleton is not None:
            compare(model, load(draft, model=skeleton))
    return source


@contextmanager
def _told(call: str) -> Iterator[None]:
    """Raise one OSError for any failure of writing; safetensors reports a full disk by a type of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, (ConnectionError, FileExistsError)):
            raise
        raise OSError(
            f"{call}: it could not be written ({short(str(error), 200)}). What was there before is there still. Make "
            "room, or name another folder."
        ) from error


@one_thread_if_forked()
def load(source: str | Path, *, model: nn.Module | None = None, revision: str | None = None) -> nn.Module:
    """Load a checkpoint that `save` wrote, strictly: a missing, unexpected or misshapen tensor is an error.

    Args:
        source: A folder, or a Hub id, "user/name".
        model: Your own dense model, narrowed in place and filled; required for a class that timm and transformers
            do not know, allowed for all.
        revision: Branch, tag or commit on the Hub.
    Returns:
        The model in eval mode, on the CPU, with `lfrns_provenance`: plan, budget, seed.
    Raises:
        ValueError: The folder is not one of ours, is damaged, or does not fit `model`.
        ConnectionError: The Hub is needed and cannot be reached.

    Example:
        >>> folder = lfrns.save(timm.create_model("cifar_resnet20"), "loaded")
        >>> lfrns.load(folder).num_classes
        10
    """
    folder = Path(source)
    if folder.is_dir():
        settle(folder, is_own)
    else:
        folder = fetch(str(source), revision=revision)
    config = read_config(folder)
    facts = config["slim"]
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"load({str(source)!r}): format_version {short(facts.get('format_version'))}, this package reads "
            f"{FORMAT_VERSION}. Not a folder written by lfrns_hub.save, or one of a newer version: upgrade lfrns_hub."
        )
    kind = kind_of(config)
    if model is not None:
        fill = fill_transformers if kind == "transformers" else fill_own
        with refusing(f"load({str(source)!r}, model={type(model).__name__})"):
            narrow_as_stored(model, config)
        loaded = fill(model, folder)
        prepare_as_stored(loaded, config)
    elif kind == "timm":
        loaded = load_timm(folder, config)
    elif kind == "timm_wrapper":
        loaded = load_wrapper(folder, config)
    elif kind == "transformers":
        loaded = load_transformers(folder)
    elif kind == "own":
        raise ValueError(f"load({str(source)!r}): it holds a {short(facts.get('class'))}, which neither timm nor "
                         "transformers builds. Pass the dense model: load(..., model=MyNet()).")  # fmt: skip
    else:
        raise ValueError(f"load({str(source)!r}): config.json names neither {TIMM_NAME} nor a {TYPE_PREFIX}* model.")
    if kind == "own" and config.get("label_names"):
        loaded.label_names = config["label_names"]
    carry_facts(loaded, facts)
    return loaded.eval()


def carry_config(model: nn.Module) -> nn.Module:
    """State a slim model's widths in its own config, in place, so that its library saves files that load again.

    A transformers model becomes an `Lfrns<Class>`, which differs only in its config, for save_pretrained and the
    Trainer; a timm model gets the entrypoint's arguments, for save_for_hf.

    Args:
        model: A slim model, with `lfrns_provenance`. A model that neither library can build is unchanged.
    Returns:
        The same model.
    """
    try:
        if is_wrapper(model):
            carry_wrapper(model)
        elif is_transformers(model):
            if is_narrow_base(model):
                carry_base(model)
            elif has_narrow_class(model):
                carry_transformers(model)
        elif hasattr(model, "num_classes") and (name := timm_base(model, None)) is not None:
            carry_timm(model, name)
    except (ValueError, TypeError, RuntimeError):
        pass  # its base is not the one in its config: save() reports it, and accepts another by base=
    return model


def _own_processor(model: nn.Module) -> Any:
    """Return the image processor that a model was loaded with; if it cannot be opened, log it and return None."""
    try:
        return find_processor(model)
    except (ValueError, ConnectionError) as error:
        logger.warning("The checkpoint has no image processor: %s", error)
        return None


def _num_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a model."""
    return getattr(getattr(model, "config", None), "num_labels", None) or getattr(model, "num_classes", None)
