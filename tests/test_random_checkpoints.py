"""Checkpoints at random stay within twice their file and a gibibyte; LFRNS_CHECKPOINTS says how many are tried."""

import json
import os

import pytest
import random_checkpoints

WANTED = int(os.environ.get("LFRNS_CHECKPOINTS", "0"))
COUNT = WANTED or 25


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(-(-COUNT // random_checkpoints.SHARD)))
def test_random_checkpoints_load_or_are_refused_within_twice_their_file_and_a_gibibyte(shard):
    path = random_checkpoints.FOUND / f"{shard:04d}.json"
    if WANTED and path.is_file():
        pytest.skip("found by an earlier run")
    random_checkpoints.warm_up()
    first = shard * random_checkpoints.SHARD
    tried = [random_checkpoints.try_checkpoint(n) for n in range(first, min(first + random_checkpoints.SHARD, COUNT))]
    if WANTED:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tried))
    assert tried and not [(one["number"], one["kind"], bad) for one in tried if (bad := random_checkpoints.faults(one))]


def test_a_child_that_takes_too_much_or_hangs_is_found_out():
    def take() -> str:
        return random_checkpoints.use(lambda: bytearray(2 * random_checkpoints.GIBIBYTE))

    assert random_checkpoints.in_child(take, random_checkpoints.GIBIBYTE).startswith("over")
    assert random_checkpoints.in_child(lambda: "fine", random_checkpoints.GIBIBYTE) == "fine"
    assert random_checkpoints.in_child(lambda: os.kill(os.getpid(), 9), 0) == "ended by signal 9"
    ends = ["refused: a", "fine", "fine"]
    assert not random_checkpoints.faults({"kind": "hostile", "ends": ends})
    assert random_checkpoints.faults({"kind": "honest", "ends": ends}) == ["refused: a"]
