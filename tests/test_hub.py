"""The Hub: the real client against a local server that speaks its protocol."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, hub, serve
from test_checkpoint import slim_resnet, slim_transformers

from lfrns_hub import checkpoint
from lfrns_hub.hub import push

__all__ = ["hub"]
ROOT = Path(__file__).parents[1]


def run_client(env: dict[str, str], code: str, *args: str) -> subprocess.CompletedProcess:
    """Run a program whose Hub is the local one: the client reads its environment when it is imported."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
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


def test_a_refused_push_is_one_message(tmp_path):
    folder = checkpoint.save(slim_resnet(), tmp_path / "net")
    code = """
import sys
from lfrns_hub.hub import push
try:
    push(sys.argv[1], "tester/net")
except ConnectionError as error:
    print(error)
"""
    with serve(tmp_path / "hub", token="another") as hub:
        done = run_client(hub.env, code, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "did not take it" in done.stdout and "hf auth login" in done.stdout
        assert hub.store.read("tester/net") is None


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
