"""What a model scores and what it costs: top-1, parameters, MACs, latency, and the Record that keeps them."""

import contextlib
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from lfrns_hub.batches import iterate, read_logits

# torch counts the fused attention of GPUs; that of CPUs is missing from its table and would count as nothing.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_PACKAGES = ("lfrns_hub", "torch", "timm", "transformers", "accelerate")


@dataclass
class Record:
    """The measured figures of a slim model and, where given, of its dense one; None means not measured.

    Attributes:
        dense: top1_pct, images, per_class_pct, params_m, macs_g, flops_g, latency_ms, size_mb of the dense model.
        slim: The same of the slim model, plus agreement_pct and worst_class where the dense model was given.
        setup: Machine, dtype, batch and input size of the latency, versions, the slim model's provenance.
    """

    dense: dict[str, Any] | None
    slim: dict[str, Any]
    setup: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write the record as strict JSON (no NaN), indented, one trailing newline."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or not {"slim"} <= fields.keys() <= {"dense", "slim", "setup"}:
            found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"Record.from_json({found}): a record has the keys dense, slim, setup. Is it record.json?")
        return cls(fields.get("dense"), fields["slim"], fields.get("setup", {}))

    def save(self, path: str | Path) -> None:
        """Write the record to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Read the record that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def evaluating(*models: nn.Module | None, device: torch.device | None = None) -> Iterator[None]:
    """Put models in eval mode (and on a device); on leaving, every module has its own mode and device again."""
    present = [model for model in models if model is not None]
    modes = [(module, module.training) for model in present for module in model.modules()]
    homes = [(model, _device_of(model)) for model in present]
    try:
        for model, home in homes:
            model.eval()
            if device is not None and home != device:
                model.to(device)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for model, home in homes:
            if device is not None and home != device:
                model.to(home)


def count_params(model: nn.Module) -> int:
    """Count parameters; one that several modules share counts once.

    Example:
        >>> count_params(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Count multiply-accumulates of convolutions, linear layers and attention for one image.

    The count runs on a copy on the meta device, which computes nothing; a model that cannot run there is counted
    on a copy where it is.

    Args:
        model: Left untouched.
        example_input: Images [N, C, H, W]; only the first is used.
    Returns:
        MACs of one forward pass in eval mode, batch 1.

    Example:
        >>> count_macs(nn.Conv2d(3, 4, 3, padding=1), torch.zeros(1, 3, 8, 8))
        6912
    """
    twin = copy.deepcopy(model).eval()
    image = example_input[:1].detach()
    try:
        flops = _count_flops(copy.deepcopy(twin).to("meta"), image.to("meta"))
    except (RuntimeError, NotImplementedError):
        flops = _count_flops(twin, image.to(_device_of(twin)))
    return flops // 2  # torch counts a multiplication and an addition as two


def measure_latency(
    models: dict[str, nn.Module], example_input: Tensor, *, runs: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Time one forward pass of several models, taking turns so that a busy machine slows them alike.

    Args:
        models: Name -> model, each run on the device where it is, in eval mode.
        example_input: Images [N, C, H, W], run as they are: give one image for the latency of batch 1.
        runs: Timed passes of each model.
        warmup: Passes of each model before them that are not timed.
    Returns:
        Name -> median milliseconds.
    Raises:
        ValueError: runs is below 1.
    """
    if runs < 1:
        raise ValueError(f"measure_latency(runs={runs}): at least one timed run is needed. The default is 30.")
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.no_grad():
        inputs = {name: example_input.to(_device_of(model), _dtype_of(model)) for name, model in models.items()}
        for turn in range(warmup + runs):
            for name, model in models.items():
                _wait_for(inputs[name].device)
                start = time.perf_counter()
                model(inputs[name])
                _wait_for(inputs[name].device)
                if turn >= warmup:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


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
        model: Run in eval mode; its training mode and device are as before when done.
        loader: Yields (images, labels) or dicts with pixel_values and labels.
        teacher: A model to agree with, such as the dense one.
        accelerator: Shares the images out among its processes; without it, one process on the model's device.
        progress: Show a bar on the main process.
    Returns:
        top1_pct, loss (mean cross-entropy), images, per_class_pct (None for a class without images), class_counts,
        input_size [C, H, W], and agreement_pct, the share of images on which the teacher predicts the same class.
    Raises:
        ValueError: The loader is empty or has no labels, or a label is no class of the model.
    """
    models = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    answers, input_size = _answer(models, loader, accelerator, progress)
    scores = _score(answers, "model", input_size)
    if teacher is not None:
        scores["agreement_pct"] = _percent(answers["model"] == answers["teacher"])
    return scores


def measure(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    dense: nn.Module | None = None,
    accelerator: Any = None,
    example_input: Tensor | None = None,
    progress: bool = True,
) -> Record:
    """Measure a model, and its dense one beside it on the same images and in turns on the clock.

    Args:
        model: The slim model (or any model, if there is no dense one).
        loader: Labelled images; None leaves every accuracy unmeasured.
        dense: The model it came from.
        accelerator: Shares the images out; latency is taken on the main process alone while the others wait.
        example_input: Images [N, C, H, W] of which the first sets the input size of MACs and latency. Without it: the
            size of the loader's images, else the input size that the model's timm or transformers configuration names.
        progress: Show a bar on the main process.
    Returns:
        The record, the same on every process.
    Raises:
        ValueError: No input size is known, or as `evaluate`.
    """
    models = {"slim": model} if dense is None else {"slim": model, "dense": dense}
    scores: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(("top1_pct", "images", "per_class_pct")) for name in models
    }
    input_size = None
    if loader is not None:
        answers, input_size = _answer(models, loader, accelerator, progress)
        scores = {name: _score(answers, name, input_size) for name in models}
    if example_input is None:
        example_input = torch.zeros(1, *(input_size or _configured_size(model)))
    device = _device_of(model) if accelerator is None else accelerator.device
    with evaluating(*models.values(), device=device):
        latency = _latency_on_main(models, example_input[:1], accelerator)
    for name, one in models.items():
        macs = count_macs(one, example_input)
        scores[name] |= {
            "params_m": count_params(one) / 1e6,
            "macs_g": macs / 1e9,
            "flops_g": 2 * macs / 1e9,
            "latency_ms": latency[name],
            "size_mb": sum(value.numel() * value.element_size() for value in one.state_dict().values()) / 1e6,
        }
    slim_scores, dense_scores = scores["slim"], scores.get("dense")
    if dense_scores is not None:
        measured = loader is not None
        slim_scores["agreement_pct"] = _percent(answers["slim"] == answers["dense"]) if measured else None
        slim_scores["worst_class"] = _worst_class(dense_scores, slim_scores) if measured else None
    return Record(dense_scores, slim_scores, _describe_setup(model, example_input, device))


def format_table(record: Record) -> Table:
    """Lay a record out as a table: dense against slim, and what is left of the dense figure."""
    table = Table(title=_title(record))
    for heading, justify in (("", "left"), ("dense", "right"), ("slim", "right"), ("slim / dense", "right")):
        table.add_column(heading, justify=justify)
    dense, slim = record.dense or {}, record.slim
    for label, key, form in (
        ("top-1, %", "top1_pct", ".2f"),
        ("agreement with dense, %", "agreement_pct", ".2f"),
        ("worst class, %", "worst_class", ""),
        ("params, M", "params_m", ".3f"),
        ("FLOPs, G", "flops_g", ".4f"),
        ("MACs, G", "macs_g", ".4f"),
        ("latency, ms", "latency_ms", ".2f"),
    ):
        before, after = dense.get(key), slim.get(key)
        if key == "worst_class":
            table.add_row(*_worst_class_row(label, after, record.setup.get("label_names")))
        elif key == "agreement_pct":
            table.add_row(label, "", _text(after, form), "")
        elif None in (before, after):
            table.add_row(label, _text(before, form), _text(after, form), "")
        elif key == "top1_pct":
            table.add_row(label, _text(before, form), _text(after, form), f"{after - before:+.2f} points")
        else:
            table.add_row(label, _text(before, form), _text(after, form), f"{after / before:.3f}" if before else "")
    return table


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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class of the model, before they index its logits."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} for a model with {num_classes} classes: a label "
            f"must lie in [0, {num_classes}). Give the model a head that fits the data."
        )


def _count_flops(model: nn.Module, image: Tensor) -> int:
    """Count FLOPs, two per MAC, of one forward pass."""
    with FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops}) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count FLOPs of fused attention from the shapes of its three inputs."""
    return sdpa_flop_count(query, key, value)


def _answer(
    models: dict[str, nn.Module], loader: Any, accelerator: Any, progress: bool
) -> tuple[dict[str, Tensor], list[int]]:
    """Run all models over the images: predictions by name, losses by "name loss", labels and classes, each [images]."""
    device = _device_of(next(iter(models.values()))) if accelerator is None else accelerator.device
    loader = prepare_loader(loader, accelerator)
    quiet = not progress or (accelerator is not None and not accelerator.is_main_process)
    gathered: dict[str, list[Tensor]] = {}
    input_size: list[int] = []
    with evaluating(*models.values(), device=device), torch.no_grad():
        for images, labels in tqdm(iterate(loader), total=_length(loader), desc="evaluate", disable=quiet, leave=False):
            if labels is None:
                raise ValueError(
                    "evaluate(loader) got a batch without labels: accuracy needs them. Yield (images, labels)."
                )
            images, labels = images.to(device), labels.to(device)
            batch: dict[str, Tensor] = {"labels": labels}
            for name, model in models.items():
                logits = read_logits(model(images)).float()
                check_labels(labels, logits.shape[1])
                batch[name] = logits.argmax(dim=1)
                batch[f"{name} loss"] = F.cross_entropy(logits, labels, reduction="none")
                batch[f"{name} classes"] = torch.full_like(labels, logits.shape[1])
            if accelerator is not None:
                batch = accelerator.gather_for_metrics(batch)
            for key, value in batch.items():
                gathered.setdefault(key, []).append(value.cpu())
            input_size = list(images.shape[1:])
    if not sum(len(part) for part in gathered.get("labels", [])):
        raise ValueError(
            "evaluate(loader) got no image: the loader is empty. Check the folder, the split and the limit."
        )
    return {key: torch.cat(parts) for key, parts in gathered.items()}, input_size


def _score(answers: dict[str, Tensor], name: str, input_size: list[int]) -> dict[str, Any]:
    """Sum the answers of one model up."""
    labels, right = answers["labels"], answers[name] == answers["labels"]
    num_classes = int(answers[f"{name} classes"][0])
    counts = labels.bincount(minlength=num_classes).tolist()
    hits = labels[right].bincount(minlength=num_classes).tolist()
    return {
        "top1_pct": _percent(right),
        "loss": answers[f"{name} loss"].double().mean().item(),
        "images": len(labels),
        "per_class_pct": [100 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)],
        "class_counts": counts,
        "input_size": input_size,
    }


def _percent(right: Tensor) -> float:
    """Give the share of true entries in percent."""
    return 100 * int(right.sum()) / len(right)


def _worst_class(dense: dict[str, Any], slim: dict[str, Any]) -> dict[str, Any]:
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


def _latency_on_main(models: dict[str, nn.Module], image: Tensor, accelerator: Any) -> dict[str, float]:
    """Measure latency on the main process while the others wait, and tell them."""
    if accelerator is None or accelerator.num_processes == 1:
        return measure_latency(models, image)
    accelerator.wait_for_everyone()
    times = measure_latency(models, image) if accelerator.is_main_process else dict.fromkeys(models, 0.0)
    shared = accelerator.reduce(torch.tensor(list(times.values()), device=accelerator.device), reduction="sum")
    return dict(zip(models, shared.tolist(), strict=True))


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


def _describe_setup(model: nn.Module, example_input: Tensor, device: torch.device) -> dict[str, Any]:
    """State what the figures were taken with."""
    setup = {
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
        "dtype": str(_dtype_of(model)).removeprefix("torch."),
        "batch_size": 1,
        "input_size": list(example_input.shape[1:]),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    provenance = getattr(model, "lfrns_provenance", None)
    return setup if provenance is None else setup | {"provenance": copy.deepcopy(provenance)}


def _version(package: str) -> str | None:
    """Give the installed version of a package, None where it is not installed (as in a bare checkout)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Name the processor; on Linux platform.processor() is often empty."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _device_of(model: nn.Module) -> torch.device:
    """Give the device of a model's first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Give the dtype of a model's first parameter."""
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _length(loader: Any) -> int | None:
    """Give the number of batches where the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None


def _title(record: Record) -> str:
    """Say on how many images and on what machine."""
    machine = record.setup.get("machine", {})
    images = record.slim.get("images")
    accuracy = f"{images} images tested" if images else "accuracy not measured"
    where = f"{record.setup.get('dtype')}, {machine.get('device')}, {machine.get('threads')} threads"
    return f"{accuracy}; latency: batch 1, {where}"


def _text(value: float | None, form: str) -> str:
    """Format a figure, or say that there is none."""
    return "not measured" if value is None else format(value, form)


def _worst_class_row(label: str, worst: dict[str, Any] | None, names: Any) -> tuple[str, ...]:
    """Lay out the class that lost most."""
    if worst is None:
        return label, "not measured", "not measured", ""
    name = names[worst["class"]] if names else worst["class"]
    return (
        f"worst class ({name}), %",
        f"{worst['dense_pct']:.2f}",
        f"{worst['slim_pct']:.2f}",
        f"{-worst['drop_points']:+.2f} points",
    )
