"""The launch configurations are what Accelerate reads, and say what their comments do."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

EXPECTED = {
    "cpu": (DistributedType.MULTI_GPU, 2, 1),
    "ddp": (DistributedType.MULTI_GPU, 8, 1),
    "ddp_8_machines": (DistributedType.MULTI_GPU, 64, 8),
    "fsdp2": (DistributedType.FSDP, 8, 1),
}


def test_every_configuration_is_known(repository: Path) -> None:
    assert {path.stem for path in (repository / "recipes" / "accelerate").glob("*")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(repository: Path, name: str) -> None:
    config = load_config_from_file(str(repository / "recipes" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == EXPECTED[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
