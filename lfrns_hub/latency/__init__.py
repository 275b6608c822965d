"""Latency budgets: layer times measured by width, latency of plans predicted from them, latency of models measured."""

from lfrns_hub.latency.budget import LatencyBudget
from lfrns_hub.latency.layer_times import cache_directory
from lfrns_hub.latency.meter import LatencyMeter
from lfrns_hub.latency.predict import LatencyModel
from lfrns_hub.latency.search import search
from lfrns_hub.latency.setup import LatencySetup

__all__ = ["LatencyBudget", "LatencyMeter", "LatencyModel", "LatencySetup", "cache_directory", "search"]
