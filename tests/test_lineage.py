"""Where the dense model's weights come from, and their licence: stated by the publisher, or unknown."""

import json
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import Hub, hub
from huggingface_hub import constants
from safetensors.torch import save_file
from test_checkpoint import slim_resnet, slim_transformers
from transformers import ViTConfig, ViTForImageClassification

import lfrns_hub as lfrns
from lfrns_hub.hub.lineage import base_facts
from lfrns_hub.zoo import create_dense

__all__ = ["hub"]


def front_matter(folder: Path) -> dict:
    """Read the YAML header of a folder's card."""
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def write_readme(folder: Path, front: str) -> Path:
    """Put a card with this front matter into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    return folder


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The local Hub as this process' Hub, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet50", {"base_model": "timm/resnet50.a1_in1k", "license": "apache-2.0"}),
        ("timm/resnet50.tv_in1k", {"base_model": "timm/resnet50.tv_in1k", "license": "bsd-3-clause"}),
        ("hf-hub:timm/resnet50.a1_in1k@main", {"base_model": "timm/resnet50.a1_in1k", "license": "apache-2.0"}),
        ("cifar_resnet20", {}),  # no weights are published
    ],
)
def test_timm_states_the_weights_and_their_licence(name: str, found: dict) -> None:
    assert base_facts(name) == found


def test_a_licence_without_an_identifier_on_the_hub_is_named_beside_other() -> None:
    name = next(n for n in timm.list_pretrained("*") if timm.get_pretrained_cfg(n).license == "cvnets-license")
    found = base_facts(name)
    assert (found["license"], found["license_name"]) == ("other", "cvnets-license")
    unlicensed = next(n for n in timm.list_pretrained("*") if timm.get_pretrained_cfg(n).license in (None, "unknown"))
    assert "license" not in base_facts(unlicensed)


def test_a_folder_is_asked_for_its_card(tmp_path: Path) -> None:
    stated = write_readme(tmp_path / "a", "base_model: google/vit-base-patch16-224\nlicense: mit\ntags: [x]")
    assert base_facts(str(stated)) == {"base_model": "google/vit-base-patch16-224", "license": "mit"}
    assert base_facts(f"local-dir:{stated}") == base_facts(str(stated))
    assert base_facts(str(write_readme(tmp_path / "b", "license: unknown\nlicense_name: mine"))) == {}
    assert base_facts(str(write_readme(tmp_path / "c", "license: [\nmit"))) == {}
    other = "license: other\nlicense_name: owl-1\nlicense_link: "
    assert "license_link" not in base_facts(str(write_readme(tmp_path / "e", other + "LICENSE")))
    assert base_facts(str(write_readme(tmp_path / "f", other + "https://a.b/c")))["license_link"] == "https://a.b/c"
    (tmp_path / "d").mkdir()
    assert base_facts(str(tmp_path / "d")) == {}


def test_a_name_of_nothing_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base_model='resnet5': neither a timm name, a Hub id"):
        lfrns.save(slim_resnet(), tmp_path / "out", base_model="resnet5")
    assert not list(tmp_path.iterdir())


@pytest.mark.hub
def test_a_repository_is_asked_for_its_card_once_and_then_without_a_network(
    here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.store.create("tester/net", private=False)
    state = here.store.read("tester/net")
    card = b"---\nlicense: other\nlicense_name: owl-1\nlicense_link: LICENSE\nbase_model: someone/else\n---\n"
    state["refs"]["main"] = here.store.add_commit(state, {"README.md": here.store.add_file(card, False)}, "card")
    here.store.write("tester/net", state)
    found = {"base_model": "tester/net", "license": "other", "license_name": "owl-1"}
    found["license_link"] = f"{here.endpoint}/tester/net/resolve/main/LICENSE"
    assert base_facts("tester/net") == found
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert base_facts("hf-hub:tester/net") == found
    assert base_facts("tester/not-in-the-cache") == {"base_model": "tester/not-in-the-cache"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base_facts("tester/not-in-the-cache") == {"base_model": "tester/not-in-the-cache"}
    assert time.monotonic() - started < 15


def test_a_dense_model_knows_whose_published_weights_it_has(tmp_path: Path) -> None:
    folder = write_readme(tmp_path / "vit", "base_model: google/vit-base-patch16-224-in21k\nlicense: apache-2.0")
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, num_labels=3)  # fmt: skip
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    dense = create_dense(str(folder))
    assert dense.lfrns_base == {"base_model": "google/vit-base-patch16-224-in21k", "license": "apache-2.0"}
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    assert create_dense(str(folder), weights=tmp_path / "mine.safetensors").lfrns_base == {}
    assert create_dense(str(folder), pretrained=False).lfrns_base == {}
    assert create_dense("resnet18", pretrained=False).lfrns_base == {}
    assert create_dense("cifar_resnet20").lfrns_base == {}

    images = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    result = lfrns.slim(dense, images, macs=0.8, fcr_steps=0, progress=False)
    out = lfrns.save(result.model, tmp_path / "out")
    for path in (out, lfrns.save(lfrns.load(out), tmp_path / "b"), lfrns.save(dense, tmp_path / "dense")):
        front = front_matter(path)
        assert (front["base_model"], front["license"]) == ("google/vit-base-patch16-224-in21k", "apache-2.0")
        assert front["base_model_relation"] == "finetune"


@pytest.mark.parametrize("make", [slim_resnet, lambda: slim_transformers("vit")], ids=["timm", "transformers"])
def test_the_base_that_save_is_told_stays_with_the_checkpoint(make, tmp_path: Path) -> None:
    record = {"dense": None, "slim": {}, "setup": {}}
    folder = lfrns.save(make(), tmp_path / "out", record=record)
    assert front_matter(folder)["license"] == "unknown" and "base_model" not in front_matter(folder)
    name = next(n for n in timm.list_pretrained("*") if timm.get_pretrained_cfg(n).license == "cvnets-license")
    lfrns.save(make(), folder, record=record, base_model=name, overwrite=True)
    lfrns.save(lfrns.load(folder), folder, overwrite=True)
    front = front_matter(folder)
    assert (front["license"], front["license_name"]) == ("other", "cvnets-license")
    assert front["base_model"] == timm.get_pretrained_cfg(name).hf_hub_id
    assert "- **Licence of the base:** cvnets-license\n" in (folder / "README.md").read_text()
    lfrns.save(lfrns.load(folder), folder, overwrite=True, base_model="resnet50.a1_in1k")
    assert front_matter(folder)["license"] == "apache-2.0" and "license_name" not in front_matter(folder)
    assert json.loads((folder / "config.json").read_text())["slim"]["base_model"] == "timm/resnet50.a1_in1k"
