"""The occasion of a figure: on which images it was measured, and when; only figures of one occasion are compared.

N images, V values of one.
"""

import functools
import hashlib
import secrets
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 22  # values hashed at once
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value
# Figures that are counted and not measured: always the same for images of one size.
COUNTED = ("params_m", "macs_g", "flops_g", "size_mb", "input_size")
BY_SIZE = ("macs_g", "flops_g")
ANOTHER = (
    "its figures were taken at another moment or on other images than the slim model's. lfrns evaluate --dense MODEL "
    "measures both side by side"
)


def new_occasion() -> str:
    """Return a random id for an occasion."""
    return f"{secrets.randbits(62):016x}"


def image_keys(images: Tensor, labels: Any) -> Tensor:
    """Return a number for each image and its label, [N], int64, equal for equal pixels on any device."""
    keys = _row_keys(images)
    if isinstance(labels, Tensor) and labels.ndim > 0 and len(labels) == len(images):
        keys = 3 * keys + _row_keys(labels.double()).to(keys.device)
    keys = (keys ^ (keys >> 29)) * -4658895280553007687  # so that differences do not cancel in a sum
    return keys ^ (keys >> 32)


def images_id(keys: Tensor) -> str:
    """Return an id of a set of images by their keys [N], independent of their order and of the number of processes."""
    return f"{len(keys)}-{int(keys.sum()) % 2**64:016x}"


def weights_id(model: nn.Module) -> str:
    """Return an id of a model's weights, so that equal weights can be recognised."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or tensor.is_quantized or tensor.is_sparse:
            continue
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def same_occasion(dense: dict[str, Any], slim: dict[str, Any]) -> bool:
    """Return whether the figures of a record's two sides were measured together.

    An older record without occasions shows it by the agreement of the two models, which only a call with both could
    compute.
    """
    if "occasion" in dense or "occasion" in slim:
        return dense.get("occasion") is not None and dense.get("occasion") == slim.get("occasion")
    return "agreement_pct" in slim or "explained_pct" in slim


def comparable_dense(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a record's dense side that can be compared with the slim side's.

    These are all that were measured together with them; else those that are counted, MACs only for the same input size.
    """
    dense, slim = record.get("dense") or {}, record.get("slim") or {}
    if not dense or same_occasion(dense, slim):
        return dense
    stated = (record.get("setup") or {}).get("input_size")
    same_size = dense.get("input_size") in (None, slim.get("input_size") or stated)
    return {key: dense[key] for key in COUNTED if key in dense and (same_size or key not in BY_SIZE)}


def why_no_dense(record: dict[str, Any]) -> str | None:
    """Explain why a record's dense side has no measured figures; None where it has, or where there is no reason."""
    dense, slim = record.get("dense") or {}, record.get("slim") or {}
    if dense and slim and same_occasion(dense, slim):
        return None
    return (record.get("setup") or {}).get("dense_missing") or (ANOTHER if dense and slim else None)


def comparable_budgets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the models at other budgets that were measured together with this one."""
    occasion = (record.get("slim") or {}).get("occasion")
    rows = (record.get("setup") or {}).get("budgets") or []
    return [row for row in rows if occasion is not None and row.get("occasion") == occasion]


def comparable_controls(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the controls whose accuracy was measured on the same images as the slim model's.

    Controls of a recipe without recorded images were measured on its test images; so was the slim side, unless the
    command line measured it again later, which records its `val_split`.
    """
    setup, images = record.get("setup") or {}, (record.get("slim") or {}).get("images_id")
    if images is None and "val_split" in setup:
        return []
    return [row for row in setup.get("controls") or [] if row.get("images_id") == images]


def _row_keys(values: Tensor) -> Tensor:
    """Hash each row by its bits: the sum of their products with odd numbers, modulo 2^64, [N], int64."""
    rows = values.detach().reshape(len(values), -1).contiguous()
    rows = rows.view(torch.uint8) if rows.dtype == torch.bool else rows.view(BITS[rows.element_size()])
    factors = _factors(rows.shape[1]).to(rows.device)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    parts = [(part.long() * factors).sum(1) for part in rows.split(step)]
    return torch.cat(parts) if parts else factors.new_zeros(0)


@functools.lru_cache(maxsize=4)
def _factors(count: int) -> Tensor:
    """Return random odd numbers, the same at every call."""
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count)) * 2 + 1
