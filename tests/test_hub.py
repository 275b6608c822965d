"""The Hub: the real client against a local server that speaks its protocol."""

import builtins
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hub_server import TOKEN, Fault, Hub, hub, serve
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from test_checkpoint import slim_resnet, slim_transformers
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import ViTImageProcessor

from lfrns_hub import checkpoint
from lfrns_hub.hub.push import _own_files, push
from lfrns_hub.plots import mark_of

__all__ = ["hub"]
ROOT = Path(__file__).parents[1]


def environment(env: dict[str, str]) -> dict[str, str]:
    """Set a process' environment: the Hub's client reads it when it is imported."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, **env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_client(env: dict[str, str], code: str, *args: str) -> subprocess.CompletedProcess:
    """Run a program whose Hub is the local one."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=120,
    )


ROUND_TRIP = """
import sys, timm, torch
from transformers import AutoModelForImageClassification
from lfrns_hub import checkpoint
from lfrns_hub.hub import push
from test_checkpoint import answer

for folder, repo, size in ((sys.argv[1], "tester/net", 64), (sys.argv[2], "team/vit", 32)):
    print(push(folder, repo))
    here, there = checkpoint.load(folder), checkpoint.load(repo)
    assert torch.equal(answer(here, size), answer(there, size))
    if "net" in repo:
        other = timm.create_model("hf-hub:" + repo, pretrained=True)
    else:
        other = AutoModelForImageClassification.from_pretrained(repo)
    assert torch.equal(answer(here, size), answer(other, size))
print(push(sys.argv[1], "tester/net", revision="half"))
print(push(sys.argv[2], "tester/net", create_pr=True))
assert type(checkpoint.load("tester/net", revision="half")) is type(checkpoint.load("tester/net"))
try:
    checkpoint.load("tester/absent")
except FileNotFoundError as error:
    print(error)
"""


def test_what_is_pushed_loads_from_the_hub_by_every_door(hub, tmp_path):
    net = checkpoint.save(slim_resnet(), tmp_path / "net")
    vit = checkpoint.save(slim_transformers("vit"), tmp_path / "vit")
    (net / "work").mkdir()
    (net / "work" / "dense.safetensors").write_bytes(b"mine")
    (net / "old.bin").write_bytes(b"a pickle")
    done = run_client(hub.env, ROUND_TRIP, net, vit)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{hub.endpoint}/tester/net/commit/")
    assert lines[3] == f"{hub.endpoint}/tester/net/discussions/1"
    assert "tester/absent" in lines[4]
    files = hub.files("tester/net")
    written = {"README.md", "config.json", "model.safetensors", "modeling_lfrns.py", "widths.png"}
    assert set(files) - {".gitattributes"} == written
    assert files["model.safetensors"] == (net / "model.safetensors").read_bytes()
    commits = [line for line in hub.log if line == "POST /api/models/tester/net/commit/main"]
    assert len(commits) == 2  # one for the push, one as the pull request


def test_no_network_is_one_message_within_seconds(tmp_path):
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = checkpoint.save(slim_resnet(), tmp_path / "net")
    code = """
import sys, time
from lfrns_hub import checkpoint
from lfrns_hub.hub import push
for call in (lambda: checkpoint.load("tester/net"), lambda: push(sys.argv[1], "tester/net")):
    start = time.time()
    try:
        call()
    except ConnectionError as error:
        print(f"{time.time() - start < 10} {error}".replace(chr(10), " "))
"""
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_client(env | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}, code, folder)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr[-3000:]
    assert lines[0].startswith("True load('tester/net')") and "cannot be reached" in lines[0]
    assert lines[1].startswith("True push(") and str(port) in lines[1]


def test_only_a_saved_checkpoint_is_pushed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        push(tmp_path, "tester/net", token=TOKEN)


# A process that makes calls of ours as they come, so that the Hub's client is imported once. What it waits before it
# tries again is left out: a fault is over as soon as it was met.
CLIENT = """
import json, sys, time
import torch
import lfrns_hub

def top(source, **options):
    with torch.no_grad():
        return lfrns_hub.load(source, **options)(torch.ones(1, 3, 64, 64)).argmax().item()

time.sleep = lambda seconds: None
calls = {"push": lfrns_hub.push, "top": top}
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    name, args, options = json.loads(line)
    try:
        answer = calls[name](*args, **options), None, None
    except Exception as error:
        answer = None, type(error).__name__, str(error)
    print(json.dumps(answer), file=answers, flush=True)
"""


class Client:
    """The process with our calls, and the Hub that it talks to."""

    def __init__(self, hub: Hub, process: subprocess.Popen) -> None:
        self.hub = hub
        self.process = process

    def __call__(self, name: str, *args: object, **options: object):
        """Make a call there: its value, or its error, of the built-in type that the caller gets."""
        line = [name, [str(arg) for arg in args], options]
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        value, kind, message = json.loads(self.process.stdout.readline())
        if kind is not None:
            raise getattr(builtins, kind)(message)
        return value


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    code = ["-c", CLIENT]
    with serve(tmp_path_factory.mktemp("hub")) as hub:
        process = subprocess.Popen(
            [sys.executable, *code], env=environment(hub.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        yield Client(hub, process)
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture
def hub_of(client):
    """The client's Hub, with nothing going wrong and nothing asked yet."""
    client.hub.log.clear()
    yield client.hub
    client.hub.faults.clear()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """A checkpoint of 20 MB."""
    folder = checkpoint.save(timm.create_model("resnet10t"), tmp_path_factory.mktemp("heavy") / "heavy")
    assert (folder / "model.safetensors").stat().st_size > 20e6
    return folder


@pytest.fixture
def net(tmp_path):
    return checkpoint.save(slim_resnet(), tmp_path / "net")


def change(folder: Path) -> None:
    """Save other weights of the same model there, as after more training."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name] + 1e-3 * torch.rand(())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "record.json").write_text(json.dumps({"changed": float(tensors[name].sum())}))


def is_whole(files: dict[str, bytes], folder: Path) -> bool:
    """Return whether a repository holds what the folder does; a card is merged, so it is not compared."""
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    return {name: content for name, content in files.items() if name != "README.md"} == there


UPLOAD = r"PUT /lfs/"
COMMIT = r"POST .*/commit/main"
# What happens to which request; what the error says (None: the push gets through); whether the commit is there.
FAULTS = {
    "an upload answered 429 once": (Fault(429, UPLOAD), None, True),
    "an upload answered 500 once": (Fault(500, UPLOAD), None, True),
    "an upload cut in the middle once": (Fault("cut", UPLOAD), None, True),
    "an upload whose answer is lost": (Fault("lost", UPLOAD), None, True),
    "an upload answered 429 each time": (Fault(429, UPLOAD, 99), "429 Too Many Requests.*Wait a few minutes", False),
    "an upload answered 500 each time": (Fault(500, UPLOAD, 99), "500 Internal Server Error.*Push the folder", False),
    "an upload cut each time": (Fault("cut", UPLOAD, 99), "all of this push or none of it", False),
    "a listing of uploads answered 500 each time": (Fault(500, r"POST .*/objects/batch", 99), "500", False),
    "a look at the repository answered 500": (Fault(500, r"GET /api/models/.*", 99), "500", False),
    "a check of the card answered by a page": (Fault(500, r"POST /api/validate-yaml", 99), "did not take it", False),
    "making the repository answered 429": (Fault(429, r"POST /api/repos/create"), "429.*Wait a few minutes", False),
    "a commit answered 429": (Fault(429, COMMIT), "429 Too Many Requests.*Wait a few minutes", False),
    "a commit answered 500": (Fault(500, COMMIT), "500 Internal Server Error.*Push the folder again", False),
    "a commit cut in the middle": (Fault("cut", COMMIT), "all of this push or none of it", False),
    "a commit whose answer is lost": (Fault("lost", COMMIT), "all of this push or none of it", True),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_push_leaves_the_whole_commit_or_the_old_one(client, hub_of, heavy, case):
    fault, message, arrives = FAULTS[case]
    client("push", heavy, "tester/heavy")
    old = hub_of.files("tester/heavy")
    change(heavy)
    hub_of.faults.append(replace(fault))
    if message is None:
        assert client("push", heavy, "tester/heavy").startswith(f"{hub_of.endpoint}/tester/heavy/commit/")
    else:
        with pytest.raises(ConnectionError, match=f"heavy', 'tester/heavy'.*{message}"):
            client("push", heavy, "tester/heavy")
    assert hub_of.faults[0].times < fault.times
    new = hub_of.files("tester/heavy")
    assert is_whole(new, heavy) if arrives else new == old
    hub_of.faults.clear()
    client("push", heavy, "tester/heavy")
    assert is_whole(hub_of.files("tester/heavy"), heavy)


def test_a_push_again_commits_nothing(client, hub_of, net):
    first = client("push", net, "tester/again")
    assert client("push", net, "tester/again") == first
    assert len([line for line in hub_of.log if "/commit/" in line]) == 1
    assert client.hub.store.read("tester/again")["messages"][first.rpartition("/")[2]] == "Upload net"


def test_a_push_does_not_go_over_a_commit_that_it_has_not_seen(client, hub_of, net):
    hub_of.faults.append(Fault("moved", COMMIT))
    with pytest.raises(ConnectionError, match=r"push\('.*net', 'tester/moved'\).*412.*Push the folder again"):
        client("push", net, "tester/moved")
    assert hub_of.files("tester/moved") == {}
    client("push", net, "tester/moved")
    assert is_whole(hub_of.files("tester/moved"), net)


def test_files_of_an_earlier_push_go_and_those_of_people_stay(client, hub_of, net):
    client("push", net, "tester/files")
    people = {"photo.png", "train.json", "notes/mine.txt", "notes/model.safetensors"}
    for name in ("model-00001-of-00002.safetensors", "clusters.png", "processor_config.json", *people):
        hub_of.write("tester/files", name, b"of before")
    client("push", net, "tester/files")
    files = hub_of.files("tester/files")
    assert files.keys() - {path.name for path in net.iterdir()} == people


# What has lain in folders of checkpoints, and is none: of people, of the Trainer, of a run, of our other commands.
PRIVATE = [
    ".env", "credentials.json", "notes.md", "holiday.png", "client.safetensors", "model.fp16.safetensors",
    "model-00001-of-00002.safetensors", "adapter_model.safetensors", "trainer_state.json", "training_args.bin",
    "optimizer.pt", "all_results.json", "old.bin", "model.onnx", "bench.png", "config.json.bak", "README.md~",
]  # fmt: skip


def test_what_is_no_part_of_a_checkpoint_is_not_pushed_and_named(hub, net):
    for name in PRIVATE:
        (net / name).write_text("{}")
    (net / "work").mkdir()
    (net / "work" / "config.json").write_text("{}")
    assert not {path.name for path in _own_files(net, "push", with_images=True)} & {*PRIVATE, "work"}
    done = run_client(hub.env, "import sys; from lfrns_hub.hub import push; push(*sys.argv[1:])", net, "tester/own")
    assert done.returncode == 0, done.stderr[-3000:]
    written = {"README.md", "config.json", "model.safetensors", "modeling_lfrns.py", "widths.png"}
    assert set(hub.files("tester/own")) - {".gitattributes"} == written
    assert "no part of a checkpoint and not sent: .env, README.md~, adapter_model.safetensors" in done.stderr
    assert f"and {len(PRIVATE) + 1 - 8} more" in done.stderr


def test_no_file_of_a_checkpoint_names_a_folder_of_the_machine(tmp_path):
    for kind, model in (("vit", slim_transformers("vit")), ("timm", slim_resnet())):
        first = checkpoint.save(
            model, tmp_path / "alice" / kind, processor=ViTImageProcessor() if kind == "vit" else None
        )
        again = checkpoint.save(checkpoint.load(first), tmp_path / kind, base_model=str(first))
        for file in [*_own_files(first, "push"), *_own_files(again, "push")]:
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
            assert b"alice" not in file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_what_other_writers_of_a_checkpoint_write_is_pushed(kind, tmp_path):
    model = slim_transformers("vit") if kind == "vit" else slim_resnet()
    model = checkpoint.load(checkpoint.save(model, tmp_path / "saved"))
    if kind == "vit":
        model.save_pretrained(tmp_path / "other", max_shard_size="20KB")
        ViTImageProcessor().save_pretrained(tmp_path / "other")
    else:
        timm.models.save_for_hf(model, tmp_path / "other", safe_serialization=True)
    written = {path.name for path in (tmp_path / "other").iterdir()}
    assert len([name for name in written if name.endswith(".safetensors")]) > (1 if kind == "vit" else 0)
    assert {path.name for path in _own_files(tmp_path / "other", "push")} == written


def test_shards_are_those_of_the_index_alone(tmp_path):
    model = checkpoint.load(checkpoint.save(slim_transformers("vit"), tmp_path / "saved"))
    model.save_pretrained(tmp_path / "net", max_shard_size="20KB")
    shards = sorted((tmp_path / "net").glob("*.safetensors"))
    (tmp_path / "net" / "model-00001-of-00099.safetensors").write_text("of another run")
    sent = [path.name for path in _own_files(tmp_path / "net", "push")]
    assert [path.name for path in shards] == [name for name in sent if name.endswith(".safetensors")]
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=rf"push: it has no {shards[0].name}"):
        _own_files(tmp_path / "net", "push")
    index = tmp_path / "net" / "model.safetensors.index.json"
    for name, shown in (("../secret.safetensors", "../secret"), ("credentials.json", "cred"), (None, "None")):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match=rf"push: model.safetensors.index.json names {shown}.* Save the model ag"):
            _own_files(tmp_path / "net", "push")
    index.write_text("{}")
    with pytest.raises(ValueError, match="names no file"):
        _own_files(tmp_path / "net", "push")


def test_the_picture_of_training_images_goes_where_it_is_asked_to(client, hub_of, tmp_path):
    model, mark = slim_resnet(), PngInfo()
    model.lfrns_provenance["plan"] = {"layer1.0.conv1": [0, 2, 5]}
    mark.add_text("Comment", mark_of(model.lfrns_provenance["plan"]))
    (tmp_path / "net").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "net" / "clusters.png", pnginfo=mark)
    net = checkpoint.save(model, tmp_path / "net", overwrite=True)
    local = (net / "README.md").read_text()
    assert "](clusters.png)" in local
    for asked in (True, False):
        client("push", net, "tester/images", with_images=asked)
        files = hub_of.files("tester/images")
        assert ("clusters.png" in files) == ("](clusters.png)" in files["README.md"].decode()) == asked
        assert "](widths.png)" in files["README.md"].decode()
    assert (net / "README.md").read_text() == local


def test_a_branch_is_made_and_moves_alone(client, hub_of, net):
    client("push", net, "tester/branched", commit_message="Half of it")
    old = hub_of.files("tester/branched")
    change(net)
    hub_of.faults.append(Fault(500, UPLOAD, 99))
    with pytest.raises(ConnectionError, match="500"):
        client("push", net, "tester/branched", revision="more-epochs")
    assert set(client.hub.store.read("tester/branched")["refs"]) == {"main"}
    hub_of.faults.clear()
    address = client("push", net, "tester/branched", revision="more-epochs", commit_message="More epochs")
    assert hub_of.files("tester/branched") == old
    assert is_whole(hub_of.files("tester/branched", "more-epochs"), net)
    messages = hub_of.store.read("tester/branched")["messages"]
    assert list(messages.values())[1:] == ["Half of it", "More epochs"]
    assert client("top", "tester/branched", revision="more-epochs") == client("top", net)
    assert client("top", "tester/branched", revision=address.rpartition("/")[2]) == client("top", net)
    with pytest.raises(
        FileNotFoundError, match=r"load\('tester/branched', revision='less'\).*Check the name and the rev"
    ):
        client("top", "tester/branched", revision="less")


def test_a_pull_request_leaves_the_branch_and_can_be_added_to(client, hub_of, net):
    client("push", net, "tester/pull")
    old = hub_of.files("tester/pull")
    change(net)
    assert client("push", net, "tester/pull", create_pr=True) == f"{hub_of.endpoint}/tester/pull/discussions/1"
    assert is_whole(hub_of.files("tester/pull", "refs/pr/1"), net)
    change(net)
    client("push", net, "tester/pull", revision="refs/pr/1")
    assert is_whole(hub_of.files("tester/pull", "refs/pr/1"), net)
    assert hub_of.files("tester/pull") == old
    assert client("top", "tester/pull", revision="refs/pr/1") == client("top", net)
    hub_of.faults.append(Fault("lost", COMMIT))
    with pytest.raises(ConnectionError, match=r"none of it. If there is no new pull request, push the"):
        client("push", net, "tester/pull", create_pr=True)
    assert is_whole(hub_of.files("tester/pull", "refs/pr/2"), net)
    with pytest.raises(ConnectionError, match=r"take it: Bad request: Invalid reference for a branch: refs/pr/9"):
        client("push", net, "tester/pull", revision="refs/pr/9")
    with pytest.raises(ValueError, match=r"push\(revision='half', create_pr=True\).*Give only one"):
        client("push", net, "tester/pull", revision="half", create_pr=True)


def test_what_must_be_private_does_not_go_where_all_can_see_it(client, hub_of, net):
    client("push", net, "tester/hidden", private=True)
    assert hub_of.store.read("tester/hidden")["private"]
    assert client("top", "tester/hidden") == client("top", net)
    client("push", net, "tester/open")
    old = hub_of.files("tester/open")
    change(net)
    with pytest.raises(ValueError, match=r"'tester/open', private=True\): the repository exists and is public"):
        client("push", net, "tester/open", private=True)
    assert hub_of.files("tester/open") == old


def test_a_refused_push_is_one_message(client, hub_of, net):
    with pytest.raises(ConnectionError, match=r"'tester/refused'\): .* did not take it: .*401.*`hf auth login`"):
        client("push", net, "tester/refused", token="another")
    assert hub_of.store.read("tester/refused") is None


def test_an_id_that_is_none_is_one_message(client, net):
    with pytest.raises(ValueError, match=r"push\('.*net', 'a/b/c'\).*user/name"):
        client("push", net, "a/b/c")


@pytest.mark.parametrize("what", ["cut", 429])
def test_a_download_that_is_broken_off_goes_on(client, hub_of, net, what):
    client("push", net, f"tester/broken-{what}")
    hub_of.faults.append(Fault(what, r"GET .*/model.safetensors"))
    assert client("top", f"tester/broken-{what}") == client("top", net)
    assert hub_of.faults[0].times == 0


def test_a_download_that_fails_is_one_message(client, hub_of, net):
    client("push", net, "tester/failing")
    hub_of.faults.append(Fault(500, r"GET .*/model.safetensors"))
    with pytest.raises(ConnectionError, match=r"load\('tester/failing'\).*500.*Load it again"):
        client("top", "tester/failing")
    assert client("top", "tester/failing") == client("top", net)


def test_a_corrupted_download_is_refused_and_not_kept(client, hub_of, heavy):
    client("push", heavy, "tester/corrupted")
    hub_of.faults.append(Fault("flip", r"GET .*/model.safetensors"))
    with pytest.raises(ValueError, match=r"load\('tester/corrupted'\): model.safetensors is damaged: its SHA-256"):
        client("top", "tester/corrupted")
    cache = Path(hub_of.env["HF_HOME"]) / "hub" / "models--tester--corrupted"
    weights = (heavy / "model.safetensors").read_bytes()
    assert not list(cache.rglob("model.safetensors"))
    assert all(path.stat().st_size != len(weights) for path in cache.glob("blobs/*"))
    assert client("top", "tester/corrupted") == client("top", heavy)
    assert [path.read_bytes() == weights for path in cache.rglob("model.safetensors")] == [True]


def test_a_file_that_rots_in_the_cache_is_refused_too(client, hub_of, net):
    client("push", net, "tester/rotten")
    client("top", "tester/rotten")
    cache = Path(hub_of.env["HF_HOME"]) / "hub" / "models--tester--rotten"
    [weights] = cache.rglob("model.safetensors")
    content = weights.read_bytes()
    weights.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        client("top", "tester/rotten")
    assert client("top", "tester/rotten") == client("top", net)


def test_what_people_wrote_into_the_card_survives_the_next_push(client, hub_of, net):
    client("push", net, "tester/card")
    card = hub_of.files("tester/card")["README.md"].decode()
    card = card.replace("license: unknown", "license: mit\nlanguage: en").replace("- pruned\n", "- pruned\n- birds\n")
    card = (
        card.replace("\n## Limits", "\n## Who should use it\n\nBirdwatchers.\n\n## Limits") + "\n## Thanks\n\nTo all.\n"
    )
    hub_of.write("tester/card", "README.md", card.encode())
    local = (net / "README.md").read_text()
    (net / "README.md").write_text(local.replace("# net", "# net after more epochs"))
    client("push", net, "tester/card")
    merged = hub_of.files("tester/card")["README.md"].decode()
    assert "# net after more epochs" in merged and "# net\n" not in merged
    assert "license: mit\n" in merged and "language: en\n" in merged and "- birds\n" in merged
    headings = [line for line in merged.splitlines() if line.startswith("## ")]
    assert headings[-4:] == ["## Who should use it", "## Limits", "## Citation", "## Thanks"]
    assert "\nBirdwatchers.\n" in merged and "\nTo all.\n" in merged
    assert (net / "README.md").read_text() == local.replace("# net", "# net after more epochs")


def test_a_card_that_cannot_be_read_stops_the_push(client, hub_of, net):
    client("push", net, "tester/unread")
    hub_of.write("tester/unread", "README.md", b"---\ntags: [a\n---\n# net\n")
    old = hub_of.files("tester/unread")
    change(net)
    with pytest.raises(ValueError, match=r"push\('.*net', 'tester/unread'\): README.md, the card that is there: front"):
        client("push", net, "tester/unread")
    assert hub_of.files("tester/unread") == old


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("group", [False, True], ids=["launched", "in a group"])
def test_only_the_main_process_pushes(monkeypatch, net, rank, group):
    class Reached(Exception):
        pass

    def reach(**options: object) -> None:
        raise Reached

    monkeypatch.setattr(sys.modules["lfrns_hub.hub.push"], "HfApi", reach)
    monkeypatch.setenv("RANK", "0" if group else str(rank))
    if group:
        distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        if rank == 0:
            with pytest.raises(Reached):
                push(net, "tester/net")
        else:
            assert push(net, "tester/net") is None
    finally:
        if group:
            distributed.destroy_process_group()
