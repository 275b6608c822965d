"""Time and memory of finding the units of large models on the meta device, and of cutting half of them.

    python benchmarks/trace.py [MODEL ...]

Each model runs in a process of its own, without weights; prints seconds and the peak resident memory.
"""

import resource
import subprocess
import sys
import time

MODELS = ("vit_large_patch16_224", "convnext_large", "regnety_160", "swin_large_patch4_window7_224")


def measure(name: str) -> None:
    """Find the units of one model, plan half of each group, cut, and print what it took."""
    import timm
    import torch

    import lfrns_hub as lfrns
    from lfrns_hub.surgery import cut

    with torch.device("meta"):
        model = timm.create_model(name)
    images = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    began = time.monotonic()
    groups = lfrns.find_units(model, images)
    found = time.monotonic() - began
    free = [group for group in groups if group.frozen_reason is None]
    slim = cut(model, groups, lfrns.SlimPlan({group.name: list(range(-(-group.size // 2))) for group in free}))
    seconds = time.monotonic() - began
    left = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: {len(groups)} groups, {len(free)} free, found in {found:.1f} s, with the cut {seconds:.1f} s, "
        f"params {left:.2f}, peak {peak:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
    else:
        for model_name in sys.argv[1:] or MODELS:
            subprocess.run([sys.executable, __file__, "--one", model_name], check=True)
