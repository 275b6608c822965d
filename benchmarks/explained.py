"""What the layers of a narrower network can still express of the dense one's, of any method's network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfrns_hub.method.reconstruct import fit_layers
from lfrns_hub.trace.sites import Site


def explained(
    dense: nn.Module, model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor], *, seed: int = 0
) -> dict[str, float]:
    """Return how much of each dense layer's output the inputs of a narrower model's layer can still express.

    Args:
        dense, model: Networks with the same layers of other widths; which units a layer lost need not be known.
        sites: The dense network's layers, from its trace.
        batches: Images [N, C, H, W]; four batches of five fit a weight, the fifth tells what it explains.
        seed: Of the sampled positions.
    Returns:
        Share of the variance of the outputs, of their second moment where the layer has neither bias nor norm; at
        most 1, below 0 where a constant would do better.
    """
    shares = {}
    kept = {site.module: torch.arange(dense.get_submodule(site.module).weight.shape[0]) for site in sites}
    alone = [Site(site.module, site.norm) for site in sites]
    fit_layers(dense, model, alone, kept, batches, lambda layer, fit: shares.update({layer.name: fit.share}), seed=seed)
    return shares
