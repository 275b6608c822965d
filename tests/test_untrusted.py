"""What a stranger may have put into a checkpoint: it is refused in one message, nothing of it runs or is fetched."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from memory import limited
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_checkpoint import cut_pair, slim_transformers
from torch import nn
from transformers import ViTImageProcessor

import lfrns_hub as lfrns
from lfrns_hub import checkpoint
from lfrns_hub.format.narrow import narrow, short
from lfrns_hub.format.untrusted import MAX_JSON_BYTES, read_json
from lfrns_hub.hub.index import write_index
from lfrns_hub.measure import Record, format_table
from lfrns_hub.units import SlimPlan
from lfrns_hub.zoo import create_base, read_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of timm and one of transformers."""
    root = tmp_path_factory.mktemp("saved")
    model = timm.create_model("test_vit", depth=1, img_size=32, num_classes=3)
    cut_pair(model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2, [0, 2, 5])
    return {
        "timm": checkpoint.save(model, root / "timm", label_names=["a", "b", "c"]),
        "transformers": checkpoint.save(slim_transformers("vit"), root / "transformers"),
    }


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy to spoil: of the checkpoint that the test's `which` names, timm's if it names none."""
    which = request.node.callspec.params.get("which", "timm") if hasattr(request.node, "callspec") else "timm"
    return Path(shutil.copytree(saved[which], tmp_path / "slim"))


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path) -> str:
    """Load a folder, which must end in one short line; gives it."""
    with pytest.raises(ValueError) as caught:
        lfrns.load(folder)
    message = str(caught.value)
    assert message.startswith(f"load('{folder}')")
    assert len(message) < 2000 and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "config.json is no JSON (Expecting value"),
        (b"[1, 2]", "config.json holds [1, 2], an object"),
        (b'{"a": ' * 2000, "config.json is no JSON"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "nested deeper than 64 levels"),
        (b"\xff\xfe\x00", "config.json is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json is no JSON (Exceeds the limit"),
        (b'{"slim": {"format_version": "' + b"x" * 10**6 + b'"}}', "format_version xxx"),
    ],
    ids=["empty", "list", "deep", "too deep", "no text", "long number", "long text"],
)
def test_a_config_that_is_none_is_refused(content: bytes, said: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert said in refused(folder)


def test_a_config_larger_than_any_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert "config.json has 16,777,217 bytes, at most 16,777,216 are read" in refused(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: data[:5], "model.safetensors has 5 bytes"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "announces a header of 1,152,921,504,606,846,976"),
        (lambda data: data[:8] + b"x" * len(data[8:]), "cannot be read"),
        (lambda data: data.replace(b'"F32"', b'"F8 "', 1), "cannot be read"),
    ],
    ids=["half-downloaded", "cut", "huge header", "no header", "no type"],
)
def test_weights_that_are_damaged_are_refused_by_their_header(change: Any, said: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert said in refused(folder)


def test_weights_of_another_kind_of_numbers_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "norm.weight is stored as F8_E4M3, the model has torch.float32" in refused(folder)


@pytest.mark.parametrize("base", ["/etc", "../up", "hf-hub:a/b", "http://127.0.0.1:9/x", "lfrns_slim", None, ["a"], 5])
def test_a_base_that_timm_does_not_register_is_refused(base: Any, folder: Path) -> None:
    edit(folder, lambda config: config["model_args"].update(base=base))
    assert f"lfrns_slim(base={short(base)}): not a model of this timm" in refused(folder)


def set_argument(**values: Any) -> Callable[[dict], Any]:
    return lambda config: config["model_args"].update(values)


@pytest.mark.parametrize(
    ("which", "change", "said"),
    [
        ("timm", set_argument(depth=10**9), "model_args[depth] = 1000000000: sizes must lie"),
        ("timm", set_argument(depth=60_000), "more than"),
        ("timm", set_argument(img_size=10**5), "100000: sizes must lie"),
        ("timm", set_argument(checkpoint_path="/etc/passwd"), "checkpoint_path"),
        ("timm", set_argument(shapes=[1]), "config.json builds no model"),
        ("timm", set_argument(shapes={"x" * 10**6: [1]}), "has no such parameter"),
        ("timm", set_argument(shapes={"head.weight": ["x" * 10**4] * 10**3}), "whole numbers"),
        ("timm", set_argument(attrs={"head": {"out_features": 10**9}}), "widths must lie from 0"),
        ("timm", set_argument(attrs={"head": 3}), "widths by attribute are needed"),
        ("timm", lambda config: config.update(num_classes=1 << 30), "num_classes = 1073741824"),
        ("timm", lambda config: config.update(num_classes="3"), "num_classes = 3, a int is needed"),
        ("timm", lambda config: config.update(model_args=7), "model_args = 7, a dict is needed"),
        ("timm", lambda config: config.update(slim=[]), "format_version None"),
        ("timm", lambda config: config["slim"].update(widths={"a": [1]}), "[kept, dense] by group is needed"),
        (
            "timm",
            lambda config: config["slim"].update(widths={f"{i}": [1, 1] for i in range(9999)}),
            "of 4096 groups at most",
        ),
        ("timm", lambda config: config["slim"].update(plan={"a": "012"}), "indices by group is needed"),
        ("timm", lambda config: config["slim"].update(approximate=3), "a list of groups is needed"),
        ("timm", lambda config: config["slim"].update(report={"integrity": {"a": "x"}}), "figures by name is needed"),
        ("timm", lambda config: config["slim"].update(fcr_steps="many"), "fcr_steps = many: a number is needed"),
        ("transformers", lambda config: config.update(num_hidden_layers=10**9), "num_hidden_layers] = 1000000000"),
        ("transformers", lambda config: config.update(num_hidden_layers=10**6), "asks for more than"),
        ("transformers", lambda config: config.update(hidden_size="x"), "config.json builds no model"),
        ("transformers", lambda config: config.update(num_labels=10**9), "num_labels] = 1000000000"),
        ("transformers", lambda config: config.update(attn_implementation="a/kernel"), "reaches outside"),
        ("transformers", lambda config: config.update(_attn_implementation="a/kernel"), "reaches outside"),
        ("transformers", lambda config: config.update(quantization_config={"load_in_8bit": True}), "reaches outside"),
        ("transformers", lambda config: config.update(dtype="load"), "dtype = load: it must be one of"),
        ("transformers", lambda config: config.update(model_type="lfrns_evil"), "lfrns_evil' is none of"),
        ("transformers", lambda config: config["lfrns"].update(shapes=3), "a dict by name is needed"),
    ],
)
def test_values_that_build_no_model_or_too_large_a_one_are_refused(
    which: str, change: Any, said: str, folder: Path
) -> None:
    edit(folder, change)
    assert said in refused(folder)


@pytest.mark.parametrize("classes", [5, [[1]], {"LfrnsTimmWrapperModel": 1}, "LfrnsTimmWrapperModel", [None]])
def test_classes_that_are_no_list_of_names_make_no_wrapper(classes: Any, folder: Path) -> None:
    edit(folder, lambda config: config.update(architectures=classes))
    assert type(lfrns.load(folder)) is type(create_base(folder)) is timm.models.VisionTransformer


def test_a_dense_base_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    base = "vit_giant_patch14_224"  # 4 GB
    with torch.device("meta"):
        dense = timm.create_model(base)
    shapes = {name: [1] * tensor.ndim for name, tensor in dense.state_dict().items()}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    config = {"architecture": "lfrns_slim", "model_args": {"base": base, "shapes": shapes}, "num_classes": 1}
    config |= {"slim": {"format_version": 1}, "pretrained_cfg": {"num_classes": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with limited():
        model = lfrns.load(tmp_path)
    assert sum(tensor.numel() for tensor in model.parameters()) == len(shapes)


@pytest.mark.parametrize(
    "name", ["test_resnet", "vit_base_patch16_rope_224", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"]
)
def test_buffers_that_no_file_holds_are_those_of_a_model_that_was_built_whole(name: str, tmp_path: Path) -> None:
    whole = timm.create_model(name, num_classes=3)
    loaded = lfrns.load(checkpoint.save(whole, tmp_path / "slim"))
    tensors = dict(whole.named_buffers()) | whole.state_dict()
    again = dict(loaded.named_buffers()) | loaded.state_dict()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(dict(whole.named_parameters()))


CODE = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"


@pytest.mark.parametrize("which", ["timm", "transformers"])
def test_no_code_of_a_folder_runs(which: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    (folder / "modeling_lfrns.py").write_text(CODE.format(str(tmp_path / "ran")))
    (folder / "image_processing.py").write_text(CODE.format(str(tmp_path / "ran")))
    auto = {"AutoConfig": "modeling_lfrns.X", "AutoModelForImageClassification": "modeling_lfrns.X"}
    edit(folder, lambda config: config.update(auto_map=auto))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "image_processing.X"}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    from lfrns_hub.pictures import load_processor

    model = lfrns.load(folder)
    load_processor(model)
    create_base(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_no_foreign_code_is_named_in_what_is_saved(way: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["transformers"], tmp_path / "slim"))
    foreign = {
        "AutoConfig": "evil.X",
        "AutoModel": "evil/repo--evil.X",
        "AutoImageProcessor": "evil.P",
        "AutoX": ["evil"],
    }
    edit(folder, lambda config: config.update(auto_map=foreign, custom_pipelines={"x": {"impl": "evil.Pipe"}}))
    model = lfrns.load(folder)
    processor = ViTImageProcessor()
    processor.auto_map = {"AutoImageProcessor": "evil.P"}
    if way == "save":
        checkpoint.save(model, tmp_path / "again", processor=processor)
    else:
        model.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").glob("*.json"):
        assert "evil" not in path.read_text(), path.name
    if way == "save":
        names = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"].values()
        assert {name.partition(".")[0] for name in names} == {"modeling_lfrns"}


def test_no_file_elsewhere_is_read_because_a_file_names_it(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["transformers"], tmp_path / "slim"))
    weights = load_file(folder / "model.safetensors")
    other = {name: torch.full_like(tensor, 7.0) for name, tensor in weights.items()}
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path), "peft_type": "X"})
    )
    (folder / "config.9.json").write_text("{}")
    edit(folder, lambda config: config.update(configuration_files=["config.9.json"], _name_or_path="/etc"))
    model = lfrns.load(folder)
    assert model.config.name_or_path == str(folder)
    assert not any((tensor == 7).all() for tensor in model.state_dict().values())
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(folder)


def test_weights_in_shards_are_found_by_their_names(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["transformers"], tmp_path / "slim"))
    whole = lfrns.load(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for part, chosen in enumerate((names[:5], names[5:]), start=1):
        path = folder / f"model-{part:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, path, metadata={"format": "pt"})
    again = lfrns.load(folder).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    path.unlink()
    assert "is missing" in refused(folder)


def test_a_link_is_neither_pushed_nor_written_through(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "record.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"push\(.*'user/name'\): record\.json is a link that leads out .* remove it"):
        lfrns.push(folder, "user/name")
    (folder / "record.json").unlink()
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    checkpoint.save(lfrns.load(folder), folder, overwrite=True)
    assert secret.read_text() == "{}"
    assert not (folder / "README.md").is_symlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    checkpoint.save(lfrns.load(folder), tmp_path / "link")
    assert (empty / "config.json").is_file()


def test_names_of_a_stranger_end_up_as_text_on_the_card(folder: Path) -> None:
    names = ["a|b\n# heading", "<script>x</script>", "$\\frac{1"]
    model = lfrns.load(folder)
    model.lfrns_provenance = {"widths": {"$\\frac{1": [1, 2]}, "kinds": {"$\\frac{1": "neuron"}}
    record = Record(None, {"top1_pct": 1.0}, {"label_names": names, "dataset": "<b>\nx"})
    checkpoint.save(model, folder, record=record, label_names=names, overwrite=True)
    card = (folder / "README.md").read_text().partition("---\n")[2].partition("---\n")[2]
    assert "<script>" not in card
    assert "\n# heading" not in card


def test_a_record_that_fits_no_card_is_refused_and_the_folder_is_as_it_was(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = Record(None, {"top1_pct": 1.0}, {"controls": [{"x": 1}]})
    with pytest.raises(
        ValueError, match=r"save\(.*slim', record\): no card .*KeyError: 'name'.* Measure the model again"
    ):
        checkpoint.save(lfrns.load(folder), folder, record=record, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["slim"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"x": 1}', r"\['x'\]\): a record has the keys dense, slim, setup"),
        ('{"slim": 3}', r"slim=3\): figures by name are needed"),
        ('{"slim": {"top1_pct": "80"}}', r"slim.top1_pct=80\): a number or null is needed. Measure it again"),
        ('{"slim": {}, "setup": {"epochs": "x"}}', r"setup.epochs=x\): a int or null is needed. Measure it again"),
        ('{"slim": {}, "setup": {"machine": []}}', r"setup.machine=\[\]\): a dict or null is needed"),
    ],
)
def test_a_record_of_wrong_types_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Record.from_json(text)


def test_an_index_over_a_record_without_its_cost_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "record.json").write_text('{"slim": {"top1_pct": 1.0}}')
    with pytest.raises(ValueError, match=r"net: its record\.json has no macs_g\. Measure it again"):
        write_index(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_class_name_is_no_markup_in_a_table() -> None:
    worst = {"class": 0, "dense_pct": 1.0, "slim_pct": 1.0, "drop_points": 0.0}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_table(Record(None, {"worst_class": worst}, {"label_names": ["[/red][link=http://x]y"]})))
    assert "[/red][link=http://x]y" in console.export_text()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"keep": []}', '{"keep": {"a": "012"}}', '{"keep": {"a": [0.5]}}', '{"keep": {"a": [true]}}',
     '{"keep": {"a": [1e999]}}', '{"keep": {"a": [[0]]}}', '{"keep": ' + "[" * 5000],
)  # fmt: skip
def test_a_plan_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^SlimPlan\.from_json") as caught:
        SlimPlan.from_json(text)
    assert len(str(caught.value)) < 500


def test_json_of_16_mebibytes_stays_below_a_gibibyte(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [' + "{}," * ((MAX_JSON_BYTES - 64) // 3) + "0]}")
    with limited():
        assert len(read_json(tmp_path / "x.json", "x")["a"]) > 5 * 10**6


def test_compressed_weights_are_not_unpacked(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "plain.pth")
    assert read_weights(tmp_path / "plain.pth")["x"].numel() == 1000
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(ValueError, match=r"packed\.pth.*is compressed, as torch\.save writes none.*Save model"):
        read_weights(tmp_path / "packed.pth")


def test_a_bias_that_a_base_lacks_is_created_under_its_own_name_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with pytest.raises(ValueError, match=r"0\.evilbias.*no such parameter"):
        narrow(model, {"0.evilbias": [3]}, {})
    with pytest.raises(ValueError, match=r"0\.bias.*from 1 to the base's own \[3\]"):
        narrow(model, {"0.bias": [4]}, {})
    assert narrow(model, {"0.bias": [2], "0.weight": [2, 4]}, {})[0].bias.shape == (2,)


def test_what_is_shown_of_a_value_is_one_short_line() -> None:
    for value in ("a\nb" * 1000, ["x" * 1000] * 1000, {"k" * 1000: [[[[[[1]]]]]]}, 10**200, float("nan"), "\x1b[31m"):
        shown = short(value)
        assert len(shown) <= 60
        assert shown.isprintable()
    assert short("plain") == "plain"
