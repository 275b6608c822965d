"""Draw the pictures of a model card again from its record, as after a change of lfrns_hub/plots.

    python benchmarks/redraw.py model_cards/CARD                                    # widths.png
    python benchmarks/redraw.py model_cards/CARD --dense M --weights W --data D     # and clusters.png, in a minute

M, W and D are those of the record's command: the dense model, its weights and the data. The plan, the number of
calibration images and the seed are read from the record.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lfrns_hub.measure import Record
from lfrns_hub.plots import plot_widths
from lfrns_hub.plots.clusters import plot_clusters
from lfrns_hub.units import SlimPlan
from lfrns_hub.zoo import create_dense, load_data, make_transform


def redraw_clusters(card: Path, dense: nn.Module, data: Any) -> Path:
    """Draw clusters.png of a card.

    Args:
        card: Folder with the record.json.
        dense: The dense model.
        data: Its calibration images.
    """
    provenance = Record.load(card / "record.json").setup["provenance"]
    plan, loader = SlimPlan(provenance["plan"]), DataLoader(data, 250)
    return plot_clusters(dense, plan, loader, card / "clusters.png", seed=provenance["seed"])


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path, help="folder with a record.json")
    parser.add_argument("--dense", help="timm name or folder of the dense model")
    parser.add_argument("--weights", help="its weights, where its name does not state them")
    parser.add_argument("--data", help="folder or Hub id of its data")
    args = parser.parse_args()
    setup = Record.load(args.card / "record.json").setup
    print(plot_widths(setup["provenance"], args.card / "widths.png"))
    if args.dense:
        dense = create_dense(args.dense, weights=args.weights)
        options = {"transform": make_transform(dense, train=False), "model": dense, "seed": setup["seed"]}
        data = load_data(args.data, "train", limit=setup["calibration_images"], **options)
        print(redraw_clusters(args.card, dense, data))


if __name__ == "__main__":
    main()
