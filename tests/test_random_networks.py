"""Random networks come out right or are refused in a known sentence; LFRNS_NETWORKS says how many."""

import json
import os

import pytest
import random_networks
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

WANTED = int(os.environ.get("LFRNS_NETWORKS", "0"))
COUNT = WANTED or 100


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(-(-COUNT // random_networks.SHARD)))
def test_random_networks_come_out_right_or_are_refused_in_a_known_sentence(shard):
    path = random_networks.FOUND / f"{shard:04d}.json"
    if WANTED and path.is_file():
        pytest.skip("found by an earlier run")
    tried = {}

    @seed(shard)
    @settings(
        max_examples=random_networks.SHARD, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if WANTED else (Phase.generate,),
    )  # fmt: skip
    @given(random_networks.specs(), st.sampled_from([0.9, 0.7, 0.5]), st.integers(0, 3))
    def try_all(spec, macs, weights):
        tried[repr((spec, macs, weights))] = random_networks.try_network(spec, macs, weights)

    try_all()
    assert tried
    if WANTED:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(tried.values())))
