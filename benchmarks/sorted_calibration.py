"""Calibration images that come sorted by class against the same ones shuffled: top-1 right after the cut, two seeds.

    python benchmarks/sorted_calibration.py --data-dir DIR --weights resnet20_cifar10.safetensors

Folders of pictures and many files come sorted by class. What is held out of them must be images of every class, or
ridge, fold and budget are chosen on classes that nothing was fitted to. Exits with 1 where sorted images cost more than
--most points. CIFAR-10, ResNet-20 at a quarter of its MACs, not retrained.
"""

import argparse
import sys
import time

import torch
from torch.utils.data import DataLoader, Subset

import lfrns_hub as lfrns
from lfrns_hub.measure import evaluate
from lfrns_hub.zoo import create_dense, load_data, make_transform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data/cifar10")
    parser.add_argument("--weights", default="../shared/weights/resnet20_cifar10.safetensors")
    parser.add_argument("--macs", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=2000, help="that calibrate (default: %(default)s)")
    parser.add_argument("--fcr-steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--most", type=float, default=1.0, help="points that sorted may cost (default: %(default)s)")
    args = parser.parse_args()
    dense = create_dense("cifar_resnet20", weights=args.weights)
    shown = {"transform": make_transform(dense, train=False), "model": dense}
    test = DataLoader(load_data(args.data_dir, "validation", **shown), 500)
    print(f"dense: {evaluate(dense, test, progress=False)['top1_pct']:.2f} %", flush=True)
    losses = []
    for seed in range(args.seeds):
        drawn = load_data(args.data_dir, "train", limit=args.images, seed=seed, **shown)
        labels = torch.tensor(drawn.labels)
        top1_pct = {}
        for name, order in {"shuffled": torch.arange(len(drawn)), "sorted": labels.argsort(stable=True)}.items():
            began = time.perf_counter()
            loader = DataLoader(Subset(drawn, order.tolist()), 250)
            options = {"macs": args.macs, "fcr_steps": args.fcr_steps, "seed": seed, "progress": False}
            model = lfrns.slim(dense, loader, **options).model
            top1_pct[name] = evaluate(model, test, progress=False)["top1_pct"]
            print(f"seed {seed}, {name}: {top1_pct[name]:.2f} % ({time.perf_counter() - began:.0f} s)", flush=True)
        losses.append(top1_pct["shuffled"] - top1_pct["sorted"])
    print(f"sorted costs {', '.join(f'{loss:.2f}' for loss in losses)} points, at most {args.most:g} are allowed")
    sys.exit(int(max(losses) > args.most))


if __name__ == "__main__":
    main()
