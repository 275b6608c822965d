"""Whether two checkouts of this package do the same, bit by bit: plans, weights, a short retraining, checkpoints.

    git worktree add ../before COMMIT
    python benchmarks/same_bits.py ../before .

Each checkout runs in a process of its own, on one thread of the CPU; networks have random weights of one seed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TIMM = {
    "cifar_resnet20": 32,
    "resnet50": 64,
    "mobilenetv3_small_050": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
       "intermediate_size": 128, "num_labels": 5}  # fmt: skip
RETRAINED = ("cifar_resnet20", "transformers ViT")
FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "README.md")


def digest(*parts: Any) -> str:
    """Return a hash of tensors by name, bytes and plain data."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict) and all(hasattr(value, "numpy") for value in part.values()):
            for name, tensor in sorted(part.items()):
                hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                hashed.update(tensor.detach().contiguous().numpy().tobytes())
        else:
            hashed.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return hashed.hexdigest()[:16]


def networks() -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yield names, what builds each network, and the side of its images."""
    import timm
    from transformers import ViTConfig, ViTForImageClassification

    for name, size in TIMM.items():
        yield name, lambda name=name: timm.create_model(name, num_classes=10), size
    yield "transformers ViT", lambda: ViTForImageClassification(ViTConfig(**VIT)), VIT["image_size"]


def remote_answer(folder: str, size: int) -> str:
    """Return a hash of what the folder's own code answers where the package is not installed."""
    code = f"""
import sys
sys.modules["lfrns_hub"] = None
import hashlib, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({folder!r}, trust_remote_code=True).eval()
torch.manual_seed(0)
with torch.no_grad():
    print(hashlib.sha256(model(torch.randn(2, 3, {size}, {size})).logits.numpy().tobytes()).hexdigest()[:16])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split()[-1]


def found(only: str) -> dict[str, str]:
    """Run the networks whose names hold a word with the package that Python finds, and hash what comes out."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import lfrns_hub as lfrns

    torch.set_num_threads(1)
    results: dict[str, str] = {}
    for name, build, size in networks():
        if only not in name:
            continue
        torch.manual_seed(0)
        dense = build().eval()
        images, labels = torch.randn(48, 3, size, size), torch.arange(48) % 5
        loader = DataLoader(TensorDataset(images, labels), 8)
        result = lfrns.slim(dense, loader, macs=0.6, fcr_steps=6, progress=False)
        results[f"{name}: plan"] = digest(result.plan.keep)
        results[f"{name}: weights"] = digest(result.model.state_dict())
        results[f"{name}: provenance"] = digest(result.model.lfrns_provenance)
        if name in RETRAINED:
            with tempfile.TemporaryDirectory() as folder:
                saved = Path(lfrns.save(result.model, Path(folder) / "slim"))
                for file in FILES:
                    if (saved / file).exists():
                        results[f"{name}: {file}"] = digest((saved / file).read_bytes())
                results[f"{name}: remote code"] = remote_answer(str(saved), size)
            lfrns.retrain(
                result.model, loader, teacher=dense, epochs=4, learning_rate=0.01, progress=False
            )  # 24 steps of 8 images
            results[f"{name}: retrained"] = digest(result.model.state_dict())
        print(json.dumps({key: value for key, value in results.items() if key.startswith(name)}), file=sys.stderr)
    return results


def main() -> None:
    """Compare two checkouts, or print what one gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, help="two folders; none: print what this one gives")
    parser.add_argument("--only", default="", help="networks whose names hold this")
    options = parser.parse_args()
    checkouts = options.checkouts
    if not checkouts:
        print(json.dumps(found(options.only)))
        return
    sides = []
    for checkout in checkouts:
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--only", options.only]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        sides.append(json.loads(done.stdout.splitlines()[-1]))
    before, after = sides
    different = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    print(f"{len(before) - len(different)} of {len(before)} equal")
    sys.exit(f"different: {', '.join(sorted(different))}" if different else 0)


if __name__ == "__main__":
    main()
