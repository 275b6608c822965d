"""Several processes do what one does: weights, plan; none waits for ever where another ends."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from children import end, start
from faulty_run import make_model, train
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import lfrns_hub as lfrns
from lfrns_hub.pictures.stream import stream_data
from lfrns_hub.retrain import make_accelerator, retrain
from lfrns_hub.runs.processes import ALONE, Processes

BATCH, EPOCHS = 8, 5  # of one process of two; 64 images: 20 steps


def ask(processes: Processes) -> dict[str, Any]:
    """What a process is told by all methods of Processes; the last process fails where it is to try something."""

    def fail() -> None:
        if processes.rank == processes.count - 1:
            raise OSError(f"no room on {processes.rank}")

    tried = [processes.attempt(fail, OSError), processes.attempt(fail, OSError, main_only=True)]
    return {
        "place": [processes.rank, processes.count, processes.is_main],
        "share": list(range(5))[processes.share],
        "sum": processes.sum(torch.tensor([1.0, processes.rank], dtype=torch.float64)).tolist(),
        "any": [processes.any(processes.rank == 1), processes.any(False)],
        "gather": processes.gather(f"from {processes.rank}"),
        "on main": processes.on_main(lambda: f"by {processes.rank}"),
        "tried": [[failed, str(error)] for failed, error in tried],
    }


def ask_in_a_process(rank: int, folder: Path) -> None:
    """In each of two processes: ask, and leave the answers."""
    processes = Processes(make_accelerator())
    (folder / f"{rank}.json").write_text(json.dumps(ask(processes)))
    with pytest.raises(TypeError, match="loader=list on 2 processes: only a torch DataLoader can be shared out"):
        processes.prepare_loader([torch.zeros(2, 3)])


@pytest.mark.parametrize("accelerated", [False, True])
def test_one_process_does_all_by_itself(accelerated: bool) -> None:
    answers = ask(Processes(make_accelerator()) if accelerated else ALONE)
    assert answers == {
        "place": [0, 1, True], "share": [0, 1, 2, 3, 4], "sum": [1, 0], "any": [False, False], "gather": ["from 0"],
        "on main": "by 0", "tried": [[True, "no room on 0"]] * 2,
    }  # fmt: skip


def test_two_processes_share_out_and_hear_the_same(tmp_path: Path, free_port: str) -> None:
    assert end(start(ask_in_a_process, tmp_path, processes=2, port=free_port)) == [0, 0]
    both = {"sum": [2, 1], "any": [True, False], "gather": ["from 0", "from 1"], "on main": "by 0"}
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == both | {
        "place": [0, 2, True], "share": [0, 2, 4], "tried": [[True, "None"], [False, "None"]],
    }  # fmt: skip
    assert second == both | {
        "place": [1, 2, False], "share": [1, 3], "tried": [[True, "no room on 1"], [False, "None"]],
    }  # fmt: skip


def build(name: str) -> nn.Module:
    """A timm network without BatchNorm, or with it frozen: statistics are those of one process's images."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))
    return freeze_batch_norm_2d(model) if "resnet" in name else model


def pictures() -> TensorDataset:
    draw = torch.Generator().manual_seed(5)
    labels = torch.arange(64) % 4
    return TensorDataset(torch.randn(64, 3, 32, 32, generator=draw) + labels[:, None, None, None], labels)


def train_network(name: str, processes: int) -> dict[str, torch.Tensor]:
    model = build(name)
    loader = DataLoader(pictures(), 2 * BATCH // processes, shuffle=True)
    # float32, whatever the processor prefers: sums of bfloat16 depend on how many images stand together.
    options = {"optimizer": "sgd", "learning_rate": 0.01, "mixed_precision": "no", "progress": False}
    retrain(model, loader, epochs=EPOCHS, **options)
    return model.state_dict()


def slim_network(accelerator: Any) -> Any:
    loader = DataLoader(pictures(), 8)
    return lfrns.slim(build("test_resnet"), loader, macs=0.5, fcr_steps=4, accelerator=accelerator, progress=False)


def train_and_slim(rank: int, folder: Path) -> None:
    """In each of two processes: train both networks, slim one, leave the results."""
    for name in ("test_vit", "test_resnet"):
        state = train_network(name, 2)
        save_file({key: value.clone() for key, value in state.items()}, folder / f"{name}{rank}.safetensors")
    (folder / f"plan{rank}.json").write_text(slim_network(make_accelerator(mixed_precision="no")).plan.to_json())


@pytest.mark.slow
def test_two_processes_train_and_choose_what_one_with_twice_the_batch_does(tmp_path: Path, free_port: str) -> None:
    assert end(start(train_and_slim, tmp_path, processes=2, port=free_port)) == [0, 0]
    for name in ("test_vit", "test_resnet"):
        alone, start_weights = train_network(name, 1), build(name).state_dict()
        for rank in (0, 1):
            shared = load_file(tmp_path / f"{name}{rank}.safetensors")
            assert shared.keys() == alone.keys()
            for key, value in alone.items():
                torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        moved = max(float((alone[key] - start_weights[key]).abs().max()) for key in alone)
        assert moved > 0.01, name  # a thousand times what may differ
    plan = slim_network(None).plan.to_json()
    assert [(tmp_path / f"plan{rank}.json").read_text() for rank in (0, 1)] == [plan, plan]


def train_and_leave(rank: int, folder: Path, name: str, stop: int) -> None:
    """In each of two processes: train with everything random, perhaps tell one process to stop after a step."""

    def track(values: dict[str, float], step: int) -> None:
        if "learning_rate" in values:
            with (folder / f"{name}.steps").open("a") as file:
                file.write(f"{step} ")
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    state = train(folder / name, epochs=2, seed=4, tracker=track)
    save_file(state, folder / f"{name}{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_if_they_had_not(tmp_path: Path, free_port: str) -> None:
    assert end(start(train_and_leave, tmp_path, "whole", -1, processes=2, port=free_port)) == [0, 0]
    assert end(start(train_and_leave, tmp_path, "stopped", 5, processes=2, port=free_port)) == [0, 0]
    assert not list(tmp_path.glob("stopped*.safetensors"))
    assert (tmp_path / "stopped.steps").read_text().split() == ["1", "2", "3", "4", "5"]
    assert end(start(train_and_leave, tmp_path, "stopped", -1, processes=2, port=free_port)) == [0, 0]
    assert (tmp_path / "stopped.steps").read_text() == (tmp_path / "whole.steps").read_text()
    for rank in (0, 1):
        whole, stopped = (load_file(tmp_path / f"{name}{rank}.safetensors") for name in ("whole", "stopped"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)


def train_on_a_stream(rank: int, folder: Path) -> None:
    """In each of two processes: train on three files of unlike lengths, gradients of two batches a step."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    if rank == 0:
        for number, rows in enumerate((40, 12, 4)):
            pictures = [Image.new("RGB", (6, 6), (7 * row, 3, 5)) for row in range(rows)]
            table = datasets.Dataset.from_dict({"image": pictures, "label": [row % 3 for row in range(rows)]}, features)
            table.to_parquet(str(folder / f"train-{number}-of-3.parquet"))
    make_accelerator().wait_for_everyone()
    stream = stream_data(folder, "train", transform=transforms.ToTensor(), seed=2)
    steps = []
    model = retrain(
        make_model(), stream.loader(4), epochs=2, images_per_epoch=stream.images, gradient_accumulation_steps=2,
        checkpoint_dir=folder / "run", checkpoint_every=2, progress=False, tracker=lambda _, step: steps.append(step),
    )  # fmt: skip
    save_file(model.state_dict(), folder / f"weights{rank}.safetensors")
    assert steps == ([1, 2, 3, 4, 5, 6, 7, 8] if rank == 0 else [])  # 56 images, 16 a step, twice


@pytest.mark.slow
def test_a_process_with_a_short_share_of_a_stream_holds_nobody_up(tmp_path: Path, free_port: str) -> None:
    assert end(start(train_on_a_stream, tmp_path, processes=2, port=free_port), seconds=120) == [0, 0]
    first, second = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first if "running" not in key)


def train_in_shards(rank: int, folder: Path, sharded: bool) -> None:
    """In each of two processes: train by plain DDP, or with weights in shards as FSDP2 has them.

    Accelerate starts FSDP on GPUs alone; told that it runs, it does the same on CPUs, by gloo.
    """
    accelerator = make_accelerator(seed=0)
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1000, reshard_after_forward=True,
            state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False,
        )  # fmt: skip
        accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = build("test_vit")
    loader = DataLoader(pictures(), BATCH, shuffle=True)
    options = {"teacher": build("test_vit").eval(), "epochs": 2, "optimizer": "adamw", "learning_rate": 1e-3}
    options |= {"accelerator": accelerator, "progress": False, "checkpoint_dir": folder / f"run, sharded {sharded}"}
    trained = retrain(model, loader, checkpoint_every=3, **options)
    again = retrain(build("test_vit"), loader, **options)  # all steps are done: nothing but the weights is left to get
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in trained.state_dict().items())
    assert trained is model and not any(isinstance(p, DTensor) for p in model.parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, folder / f"{'shards' if sharded else 'whole'}{rank}.safetensors")


@pytest.mark.slow
def test_weights_in_shards_train_as_whole_ones_do(tmp_path: Path, free_port: str) -> None:
    for sharded in (True, False):
        assert end(start(train_in_shards, tmp_path, sharded, processes=2, port=free_port)) == [0, 0]
    whole, begin = load_file(tmp_path / "whole0.safetensors"), build("test_vit").state_dict()
    for rank in (0, 1):
        shards = load_file(tmp_path / f"shards{rank}.safetensors")
        for key, value in whole.items():
            torch.testing.assert_close(shards[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert max(float((whole[key] - begin[key]).abs().max()) for key in whole) > 0.003  # thirty times what may differ


def train_until_one_fails(rank: int, folder: Path) -> None:
    """In each of two processes: train, until an image of one of them cannot be read."""

    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if rank == 1 and index == 20:
                raise OSError("this image cannot be read")
            return super().__getitem__(index)

    images = Broken(torch.randn(32, 3, 6, 6), torch.arange(32) % 3)
    retrain(make_model(), DataLoader(images, 4), epochs=1, checkpoint_dir=folder, progress=False)


@pytest.mark.parametrize("case", ["image", "disk"])
def test_where_one_process_fails_none_waits_for_ever(case: str, tmp_path: Path, free_port: str) -> None:
    function = {"image": train_until_one_fails, "disk": train_where_nothing_can_be_written}[case]
    codes = end(start(function, tmp_path, processes=2, port=free_port), seconds=90)
    assert all(code not in (0, None) for code in codes), codes


def train_where_nothing_can_be_written(rank: int, folder: Path) -> None:
    """In each of two processes: the folder of the checkpoints is a file."""
    if rank == 0:
        (folder / "file").write_text("")
    train(folder / "file" / "run")
