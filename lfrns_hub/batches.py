"""What loaders yield and models answer, in one form: timm's tuples, transformers' dicts, bare images."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Split one batch of a loader into images and labels.

    Args:
        batch: `(images, labels)`, a dict with `pixel_values` and perhaps `labels`, or bare images [N, C, H, W].
    Returns:
        Images [N, C, H, W] and labels [N] int64, None where the batch has none.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        if "pixel_values" not in batch:
            raise ValueError(f"a batch has the keys {sorted(batch.keys())}: images must come as 'pixel_values'.")
        return batch["pixel_values"], batch.get("labels", batch.get("label"))
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) > 1 else None
    raise ValueError(f"a batch is a {type(batch).__name__}: yield (images, labels), a dict, or bare images.")


def read_logits(output: Any) -> Tensor:
    """Give the logits [N, classes] of a model's output, a tensor (timm) or a ModelOutput (transformers)."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(f"the model answers with {type(output).__name__}: a tensor or an output with .logits is needed.")


def iterate(loader: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (images, labels or None) for each batch of a loader."""
    for batch in loader:
        yield split_batch(batch)
