"""Golden checkpoints: a folder of every format_version there ever was opens, and answers what it answered."""

from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from ways_in import distance

from lfrns_hub import checkpoint

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.rglob("config.json"))


def test_every_version_has_both_kinds() -> None:
    versions = range(1, checkpoint.FORMAT_VERSION + 1)
    expected = {f"v{v}/{k}" for v in versions for k in ("timm", "transformers")}
    assert {str(f.relative_to(GOLDEN)) for f in FOLDERS} == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(GOLDEN)))
def test_a_golden_checkpoint_answers_as_it_did(folder: Path) -> None:
    models = [checkpoint.load(folder), AutoModelForImageClassification.from_pretrained(folder)]
    if folder.name == "timm":
        models.append(timm.create_model(f"local-dir:{folder}", pretrained=True))
    saved = load_file(folder / "answers.safetensors")
    assert max(distance(model, saved) for model in models) <= 1e-5
    [(name, kept)] = models[0].lfrns_provenance["plan"].items()
    assert models[0].lfrns_provenance["widths"][name][0] == len(kept)
    there = dict(models[0].named_modules())
    assert name in there or folder.name == "transformers"  # an older release of it may call the layer otherwise
    assert name not in there or len(kept) == there[name].weight.shape[0]
