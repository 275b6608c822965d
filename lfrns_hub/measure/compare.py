"""Measurement of one model, or of slim models and their dense one: the Record of all figures."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.measure.counting import count_macs, count_params
from lfrns_hub.measure.latency import describe_setup, measure_latency
from lfrns_hub.measure.occasion import new_occasion, weights_id
from lfrns_hub.measure.record import Record
from lfrns_hub.measure.score import answer, merged
from lfrns_hub.model_io.model import device_of, evaluating, unwrap
from lfrns_hub.runs.processes import Processes


def measure(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    dense: nn.Module | None = None,
    accelerator: Any = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> Record:
    """Measure a model and its dense one, on the same images and with alternating latency runs.

    Args:
        model: The slim model (or any model, if there is no dense one). Wrappers of torch.compile and DDP are removed:
            the figures are the plain module's.
        loader: Labelled images, or unlabelled ones for a model that returns features; None leaves every accuracy
            unmeasured. Images are cast to each model's dtype. The meaning of the outputs, and so the figures, is
            determined as for `slim`.
        dense: The model that it was made from.
        accelerator: Splits the images over its processes; latency is measured only on the main process while others
            wait.
        example_input: Images [N, C, H, W]; the first sets the input size for MACs and latency. Without it: the size of
            the loader's images, else the input size in the model's timm or transformers configuration.
        progress: Show a bar on the main process.
    Returns:
        The record, the same on every process, with the figures that fit the outputs; see `evaluate`. For features it
        has only explained_pct.
    Raises:
        ValueError: No input size is known, or as for `evaluate`.

    Example:
        >>> record = lfrns.measure(timm.create_model("cifar_resnet20"), progress=False)
        >>> round(record.slim["macs_g"], 4), record.slim["top1_pct"]
        (0.0406, None)
    """
    options = {"accelerator": accelerator, "example_input": example_input, "progress": progress}
    return measure_each({"slim": model}, loader, dense=dense, **options)["slim"]


def measure_each(
    models: dict[str, nn.Module],
    loader: Iterable[Any] | None = None,
    *,
    dense: nn.Module | None = None,
    accelerator: Any = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> dict[str, Record]:
    """Measure several slim models of one dense model in a single pass over the images, with alternating latency runs.

    Args:
        models: By name, at least one; the name "dense" is reserved.
        loader, dense, accelerator, example_input, progress: As for `measure`.
    Returns:
        A record for each model, as `measure` would return it, all from one occasion.
    Raises:
        ValueError: As for `measure`.
    """
    slims = {name: unwrap(model, "measure") for name, model in models.items()}
    models = slims if dense is None else {**slims, "dense": unwrap(dense, "measure")}
    first = next(iter(slims.values()))
    scores: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(("top1_pct", "images", "per_class_pct")) for name in models
    }
    processes = Processes(accelerator)
    occasion, answers = processes.on_main(new_occasion), None
    if loader is not None:
        answers = answer(models, loader, processes, progress)
        scores = {name: scores[name] | answers.score(name) for name in models}
    if example_input is None:
        example_input = torch.zeros(1, *answers.input_size) if answers else _configured_image(first)
    device = processes.device or device_of(first)
    with evaluating(*models.values(), device=device):
        latency = processes.on_main(lambda: measure_latency(models, example_input[:1]))
    for name, one in models.items():
        macs = count_macs(one, example_input)
        scores[name] |= {
            "occasion": occasion,
            "input_size": list(example_input.shape[1:]),
            "params_m": count_params(one) / 1e6,
            "macs_g": macs / 1e9,
            "flops_g": 2 * macs / 1e9,
            "latency_ms": latency[name],
            "size_mb": sum(value.numel() * value.element_size() for value in one.state_dict().values()) / 1e6,
        }
    dense_scores = scores.get("dense")
    if dense_scores is not None:
        for name in slims:
            scores[name] |= dict.fromkeys(("agreement_pct", "worst_class"))
            if answers is not None:
                scores[name] = merged(scores[name], answers.compared(name, "dense"))
    which = (
        {"dense_missing": "no dense model was given"} if dense is None else {"dense_id": weights_id(models["dense"])}
    )
    return {
        name: Record(copy.copy(dense_scores), scores[name], describe_setup(one, example_input, device) | which)
        for name, one in slims.items()
    }


def _configured_image(model: nn.Module) -> Tensor:
    """Return a black image of the size in a model's configuration, which other arguments may have overridden."""
    image = torch.zeros(1, *_configured_size(model))
    try:
        count_macs(model, image)
    except Exception as error:
        raise ValueError(
            f"measure({type(model).__name__}): it does not run on {list(image.shape[1:])}, the input size that its "
            "configuration names. Pass a loader, or example_input=images."
        ) from error
    return image


def _configured_size(model: nn.Module) -> list[int]:
    """Read [C, H, W] from timm's pretrained_cfg or a transformers config."""
    timm_config = getattr(model, "pretrained_cfg", None) or {}
    if timm_config.get("input_size"):
        return list(timm_config["input_size"])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return [getattr(model.config, "num_channels", 3), height, width]
    raise ValueError(
        f"measure({type(model).__name__}): nothing names its input size. Pass a loader, or "
        "example_input=torch.zeros(1, 3, 224, 224)."
    )
