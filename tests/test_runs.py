"""Folders that change whole or not at all, and the lock that one process holds on one."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import lfrns_hub as lfrns
from lfrns_hub.checkpoint import holds_ours, is_own, prepared
from lfrns_hub.hub.handwritten import MARK
from lfrns_hub.recipe import save_trained
from lfrns_hub.runs import atomic, draft_of, locked, put_in_place, settle


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, *names: str, text: str = "old") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def change(folder: Path, *names: str, **options: bool) -> None:
    with locked(folder, "call"), draft_of(folder) as draft:
        put_in_place(write(draft, *names, text="new"), folder, is_own, **options)


def in_child(work: Callable[[], None]) -> int:
    """Fork a child that works and then waits; gives its number once it has worked."""
    done, told = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
            os.write(told, b".")
            signal.pause()
        os._exit(1)
    os.close(told)
    assert os.read(done, 1) == b"."
    os.close(done)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cifar_resnet20", num_classes=3).eval()


@pytest.mark.parametrize("how", ["exchanged", "by journal", "from inside"])
def test_a_folder_takes_new_files_loses_stale_ones_and_keeps_those_of_others(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "slim", "config.json", "record.json", "notes.md", "work/run/log.txt")
    (folder / "link").symlink_to(tmp_path / "nowhere")
    folder.chmod(0o750)
    log = (folder / "work/run/log.txt").open("a")
    before = folder.stat().st_ino
    if how == "by journal":
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    elif how == "from inside":
        monkeypatch.chdir(folder)
    change(folder, "config.json", "model.safetensors")
    log.write(" and open")
    log.close()
    assert files(folder) == {
        "config.json": "new",
        "model.safetensors": "new",
        "notes.md": "old",
        "work/run/log.txt": "old and open",
    }
    assert os.readlink(folder / "link") == str(tmp_path / "nowhere")
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder.stat().st_ino == before) == (how != "exchanged")
    assert os.listdir(tmp_path) == ["slim"]


def test_a_link_is_followed_to_its_folder_and_a_link_inside_is_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", "config.json")
    write(tmp_path, "elsewhere.json")
    (folder / "record.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "link").symlink_to(folder)
    change((tmp_path / "link").resolve(), "record.json")
    assert (tmp_path / "link").is_symlink() and files(folder) == {"record.json": "new"}
    assert (tmp_path / "elsewhere.json").read_text() == "old"


def test_a_folder_that_nothing_can_be_renamed_next_to_holds_its_own_draft_and_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    node = folder.stat().st_ino
    for seed in (0, 1):
        with prepared(network(seed), folder, overwrite=seed > 0) as draft:
            assert draft.parent == folder
        lfrns.save(network(seed), folder, overwrite=seed > 0)
        assert torch.equal(lfrns.load(folder).linear.weight, network(seed).linear.weight)
    assert folder.stat().st_ino == node and not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_card_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    folder = lfrns.save(network(), tmp_path / "slim")
    (tmp_path / "secret").write_text("## Key\n\nhunter2\n")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    lfrns.save(network(), folder, overwrite=True)
    assert "hunter2" not in (folder / "README.md").read_text() and (tmp_path / "secret").exists()


def test_what_people_wrote_in_the_card_stays_whatever_is_saved(tmp_path: Path) -> None:
    folder = lfrns.save(network(), tmp_path / "slim")
    card = (folder / "README.md").read_text().replace("\n---\n", "\nco2_eq_emissions: 3\n---\n", 1)
    card = card.replace("## Limits", "My notes\n--------\n\nFour weeks.\n\n~~~\npip install x\n\n## Limits")
    (folder / "README.md").write_text(card + "\n   ## Last\n\nWords.\n")
    for seed in (1, 2):
        lfrns.save(network(seed), folder, overwrite=True)
    text = (folder / "README.md").read_text()
    assert "My notes\n--------\n\nFour weeks.\n\n~~~\npip install x\n\n~~~\n\n## Limits" in text
    assert text.endswith("\n## Last\n\nWords.\n") and "co2_eq_emissions: 3" in text
    assert text.count("## Limits") == text.count("## Use") == text.count("# slim") == 1


def test_a_card_of_an_earlier_version_has_no_section_twice(tmp_path: Path) -> None:
    folder = lfrns.save(network(), tmp_path / "slim")
    card = (folder / "README.md").read_text().replace(MARK + "\n", "")
    (folder / "README.md").write_text(card + "\n## Mine\n\nText.\n")
    lfrns.save(network(1), folder, overwrite=True)
    text = (folder / "README.md").read_text()
    assert text.count("## Limits") == text.count("# slim") == 1 and text.endswith("## Mine\n\nText.\n")


def test_a_second_process_is_refused_until_the_first_one_dies_and_its_draft_is_swept(tmp_path: Path) -> None:
    folder = write(tmp_path / "slim", "config.json")

    stack = contextlib.ExitStack()

    def hold_and_draft() -> None:
        stack.enter_context(locked(folder, "first"))
        write(stack.enter_context(draft_of(folder)), "model.safetensors")
        if not os.fork():  # a worker of a loader outlives its killed parent, and holds nothing
            signal.alarm(20)
            signal.pause()

    child = in_child(hold_and_draft)
    try:
        with pytest.raises(BlockingIOError, match=rf"second: process {child} is writing to '.*slim'. Wait for its end"):
            with locked(folder, "second"):
                pass
        with pytest.raises(BlockingIOError, match=r"save\('.*slim'\): process"):
            lfrns.save(network(), folder, overwrite=True)
        assert len(list(tmp_path.glob(".lfrns-*"))) == 2
    finally:
        kill(child)
    change(folder, "config.json")
    assert os.listdir(tmp_path) == ["slim"] and files(folder) == {"config.json": "new"}


def test_a_process_may_hold_a_folder_several_times_and_its_child_does_not(tmp_path: Path) -> None:
    with locked(tmp_path / "slim", "outer"), locked(tmp_path / "slim", "inner"):

        def refused() -> None:
            with pytest.raises(BlockingIOError), locked(tmp_path / "slim", "child"):
                pass

        kill(in_child(refused))
        assert list(tmp_path.glob("*.lock"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", range(4))
def test_a_journal_is_completed_wherever_it_was_left(steps: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "slim", "config.json", "record.json", "notes.md")
    journal = write(folder / atomic.JOURNAL, "config.json", "model.safetensors", text="new")
    (journal / atomic.NAMES).write_text(
        json.dumps({"leave": ["record.json"], "put": ["config.json", "model.safetensors"]})
    )
    for step in range(steps):
        if step == 0:
            (folder / "record.json").unlink()
        else:
            name = ["config.json", "model.safetensors"][step - 1]
            (journal / name).replace(folder / name)
    settle(folder, is_own)
    assert files(folder) == {"config.json": "new", "model.safetensors": "new", "notes.md": "old"}
    settle(folder, is_own)


@pytest.mark.parametrize("name", ["../slim2/notes.md", "notes.md", "..", "", 3, None])
@pytest.mark.parametrize("part", ["leave", "put"])
def test_a_strangers_journal_touches_nothing_but_a_checkpoints_files(part: str, name: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "slim", "config.json", "notes.md")
    write(tmp_path / "slim2", "notes.md")
    journal = write(folder / atomic.JOURNAL, "config.json", "notes.md", text="new")
    names = {"leave": ["config.json"], "put": []}
    names[part] = [name]
    (journal / atomic.NAMES).write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"the journal .lfrns-next in it names .*Remove that folder"):
        lfrns.load(folder)
    assert files(tmp_path / "slim2") == {"notes.md": "old"}
    assert (folder / "notes.md").read_text() == (folder / "config.json").read_text() == "old"


def test_what_others_wrote_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "project", "README.md", "config.json")
    with pytest.raises(FileExistsError, match=r"holds config.json, README.md and no checkpoint or run of lfrns_hub"):
        lfrns.save(network(), tmp_path / "project", overwrite=True)
    assert files(tmp_path / "project") == {"README.md": "old", "config.json": "old"}
    assert not holds_ours(tmp_path / "project")


def test_names_as_long_as_the_system_takes_are_saved_and_longer_ones_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 255)
    lfrns.save(network(), folder)
    lfrns.save(network(1), folder, overwrite=True)
    assert torch.equal(lfrns.load(folder).linear.weight, network(1).linear.weight)
    with pytest.raises(OSError, match=r"cannot be written \(File name too long\). Name a folder that can"):
        with locked(tmp_path / ("n" * 256), "call"):
            pass


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_modes_follow_the_umask_whatever_wrote_the_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = lfrns.save(network(), tmp_path / "slim")
        lfrns.save(network(1), folder, overwrite=True)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_prepared_save_keeps_its_room_and_leaves_nothing(tmp_path: Path) -> None:
    folder = lfrns.save(network(), tmp_path / "slim")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with prepared(network(1), folder, overwrite=True) as draft:
        assert draft.parent == tmp_path
        assert (draft / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert os.listdir(tmp_path) == ["slim"] and {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [0, 3000, 40000])
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(
    size: int, tmp_path: Path, fill_disk: Callable[[int], None]
) -> None:
    folder = lfrns.save(network(), tmp_path / "slim")
    fill_disk(size)
    with pytest.raises(OSError) as told:
        lfrns.save(network(1), folder, overwrite=True)
    fill_disk(-1)
    assert re.search("What was there before is there still. Make room|cannot be written", str(told.value))
    assert "\n" not in str(told.value)
    assert torch.equal(lfrns.load(folder).linear.weight, network().linear.weight)
    assert os.listdir(tmp_path) == ["slim"]


def test_a_trained_model_whose_folder_fails_is_saved_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write(tmp_path, "file")
    with pytest.raises(OSError, match="cannot be written"):
        save_trained(network(1), tmp_path / "file" / "slim", overwrite=True)
    said = capsys.readouterr().err
    (rescue,) = tmp_path.glob("lfrns-*")
    assert f"the trained model could only be saved in {rescue}" in said
    assert torch.equal(lfrns.load(rescue).linear.weight, network(1).linear.weight)
