"""Run models over images, each counted once on however many processes, and sum their answers up."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lfrns_hub.answers import Answer, check_labels, read_answer
from lfrns_hub.batches import UNREADABLE, check_finite, iterate
from lfrns_hub.measure.occasion import image_keys, images_id
from lfrns_hub.running import as_input, device_of, evaluating, unwrap


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a model on labelled images, each counted once, on however many processes.

    Args:
        model: Run in eval mode, out of any wrapper; its training mode and device are as before when done.
        loader: Yields (images, labels) or dicts with pixel_values and labels.
        teacher: A model to agree with, such as the dense one.
        accelerator: Shares the images out among its processes; without it, one process on the model's device.
        progress: Show a bar on the main process.
    Returns:
        top1_pct, loss (mean cross-entropy), images, images_skipped (those that could not be read, of label -100: they
        count in no other figure), images_id (which images these are), per_class_pct (None for a class without images),
        class_counts, input_size [C, H, W], and agreement_pct, the share of images on which the teacher predicts the
        same class.
    Raises:
        ValueError: The loader is empty or has no labels, a label is no class of the model, or it has no classes.
    """
    models = {"model": unwrap(model, "evaluate")}
    if teacher is not None:
        models["teacher"] = unwrap(teacher, "evaluate")
    answers, input_size, skipped = answer(models, loader, accelerator, progress)
    if "labels" not in answers:
        raise ValueError(
            f"evaluate({type(models['model']).__name__}): it answers with features, and accuracy needs logits [N, "
            "classes]. measure(model, loader, dense=dense) tells how near two feature extractors are."
        )
    scores = score(answers, "model", input_size, skipped)
    if teacher is not None:
        scores["agreement_pct"] = percent(answers["model"] == answers["teacher"])
    return scores


def prepare_loader(loader: Any, accelerator: Any) -> Any:
    """Share a loader's images out among the processes of an accelerator; one prepared before stays as it is."""
    if accelerator is None:
        return loader
    if isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
        return accelerator.prepare_data_loader(loader)
    if accelerator.num_processes == 1:
        return loader
    raise TypeError(
        f"loader={type(loader).__name__} on {accelerator.num_processes} processes: only a torch DataLoader can be "
        "shared out. Wrap the images in one."
    )


def answer(
    models: dict[str, nn.Module], loader: Any, accelerator: Any, progress: bool
) -> tuple[dict[str, Tensor], list[int], int]:
    """Run all models over the images.

    Args:
        models: By name, without wrappers; the last is the one that others are compared with.
        loader: Batches; their labels are read only where the models answer with logits.
        accelerator: Shares the images out.
        progress: Show a bar on the main process.
    Returns:
        Tensors [images], the input size [C, H, W], and how many images were left out as unreadable. For logits:
        predictions by name, losses by "name loss", the number of classes by "name classes", "labels". For features: by
        "name error" the relative error of each image. For both "image keys", which say what images these are.
    Raises:
        ValueError: There is no image, one has values that are not finite, or as `_classify`.
    """
    device = device_of(next(iter(models.values()))) if accelerator is None else accelerator.device
    loader = prepare_loader(loader, accelerator)
    quiet = not progress or (accelerator is not None and not accelerator.is_main_process)
    gathered: dict[str, list[Tensor]] = {}
    input_size: list[int] = []
    with evaluating(*models.values(), device=device), torch.no_grad():
        for images, labels in tqdm(iterate(loader), total=_length(loader), desc="evaluate", disable=quiet, leave=False):
            check_finite(images, "evaluate(loader)")
            answers = {name: read_answer(model, model(as_input(images, model))) for name, model in models.items()}
            if all(one.is_logits for one in answers.values()):
                batch = _classify(answers, labels, device)
            else:
                *_, dense = answers.values()
                batch = {f"{name} error": one.relative_error(dense) for name, one in answers.items()}
            batch["image keys"] = image_keys(images, labels).to(device)
            batch["counted"] = _counted(labels, len(images)).to(device)
            if accelerator is not None:
                batch = accelerator.gather_for_metrics(batch)
            for key, value in batch.items():
                gathered.setdefault(key, []).append(value.cpu())
            input_size = list(images.shape[1:])
    whole = {key: torch.cat(parts) for key, parts in gathered.items()}
    counted = whole.pop("counted", torch.zeros(0, dtype=torch.bool))
    if not counted.any():
        raise ValueError(
            "evaluate(loader) got no image: the loader is empty, or none could be read. Check the folder, the split "
            "and the limit."
        )
    return {key: part[counted] for key, part in whole.items()}, input_size, int((~counted).sum())


def _counted(labels: Any, images: int) -> Tensor:
    """Tell which images of a batch count: all but those that could not be read, [N], bool."""
    if isinstance(labels, Tensor) and labels.shape == (images,):
        return labels != UNREADABLE
    return torch.ones(images, dtype=torch.bool)


def _classify(answers: dict[str, Answer], labels: Any, device: torch.device) -> dict[str, Tensor]:
    """Give each image's predictions and losses.

    Raises:
        ValueError: There are no labels, or one is no class of a model.
    """
    if labels is None:
        raise ValueError("evaluate(loader) got a batch without labels: accuracy needs them. Yield (images, labels).")
    labels = labels.to(device)
    batch: dict[str, Tensor] = {"labels": labels}
    for name, one in answers.items():
        logits = one.parts[0].float()
        check_labels(labels, logits.shape[1])
        batch[name] = logits.argmax(dim=1)
        batch[f"{name} loss"] = F.cross_entropy(logits, labels, reduction="none")
        batch[f"{name} classes"] = torch.full_like(labels, logits.shape[1])
    return batch


def score(answers: dict[str, Tensor], name: str, input_size: list[int], skipped: int) -> dict[str, Any]:
    """Sum the answers of one model up; features leave all but images and input size unmeasured."""
    if "labels" not in answers:
        unmeasured = dict.fromkeys(("top1_pct", "loss", "per_class_pct", "class_counts"))
        images = len(answers[f"{name} error"])
        shown = {"images": images, "images_id": images_id(answers["image keys"]), "images_skipped": skipped}
        return {**unmeasured, **shown, "input_size": input_size}
    labels, right = answers["labels"], answers[name] == answers["labels"]
    num_classes = int(answers[f"{name} classes"][0])
    counts = labels.bincount(minlength=num_classes).tolist()
    hits = labels[right].bincount(minlength=num_classes).tolist()
    return {
        "top1_pct": percent(right),
        "loss": answers[f"{name} loss"].double().mean().item(),
        "images": len(labels),
        "images_id": images_id(answers["image keys"]),
        "images_skipped": skipped,
        "per_class_pct": [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)],
        "class_counts": counts,
        "input_size": input_size,
    }


def percent(right: Tensor) -> float:
    """Give the share of true entries in percent."""
    return 100 * int(right.sum()) / len(right)


def worst_class(dense: dict[str, Any], slim: dict[str, Any]) -> dict[str, Any]:
    """Find the class that lost most; of equals, the first."""
    pairs = zip(dense["per_class_pct"], slim["per_class_pct"], strict=True)
    drops = [(before - after, -index) for index, (before, after) in enumerate(pairs) if before is not None]
    drop, negative_index = max(drops)
    index = -negative_index
    return {
        "class": index,
        "dense_pct": dense["per_class_pct"][index],
        "slim_pct": slim["per_class_pct"][index],
        "drop_points": drop,
    }


def _length(loader: Any) -> int | None:
    """Give the number of batches where the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None
