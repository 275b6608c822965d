"""Parameters and multiply-accumulates of one forward pass, counted without computing it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lfrns_hub.format.narrow import model_copy
from lfrns_hub.model_io.model import as_input, unwrap

# torch counts the fused attention of GPUs; the CPU kernel is missing from its table and would count as zero.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_params(model: nn.Module) -> int:
    """Count parameters; a parameter that several modules share counts once.

    Example:
        >>> count_params(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Count multiply-accumulates of convolutions, linear layers and attention for one image.

    The count runs on a copy on the meta device, which computes nothing; a model that cannot run there is counted on
    a copy on its own device.

    Args:
        model: Untouched; may be wrapped by torch.compile or DDP.
        example_input: Images [N, C, H, W]; only the first is used.
    Returns:
        MACs of one forward pass in eval mode, batch 1.

    Example:
        >>> count_macs(nn.Conv2d(3, 4, 3, padding=1), torch.zeros(1, 3, 8, 8))
        6912
    """
    twin = model_copy(unwrap(model, "count_macs")).eval().requires_grad_(False)
    image = as_input(example_input[:1].detach(), twin)
    try:
        flops = _count_flops(model_copy(twin).to("meta"), image.to("meta"))
    except (RuntimeError, NotImplementedError):
        flops = _count_flops(twin, image)
    return flops // 2  # torch counts a multiplication and an addition as two


def _count_flops(model: nn.Module, image: Tensor) -> int:
    """Count FLOPs, two per MAC, of one forward pass."""
    with FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops}) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count FLOPs of fused attention from the shapes of its three inputs."""
    return sdpa_flop_count(query, key, value)
