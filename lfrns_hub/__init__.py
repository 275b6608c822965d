"""Low functional redundancy network slimming for timm and transformers image classifiers."""

from lfrns_hub import models  # noqa: F401  (registers the CIFAR networks with timm)
from lfrns_hub.checkpoint import load, save
from lfrns_hub.hub import push
from lfrns_hub.latency import LatencySetup
from lfrns_hub.measure import Record, measure
from lfrns_hub.retrain import retrain
from lfrns_hub.self_check import check, find_units
from lfrns_hub.slim import analyse, slim
from lfrns_hub.trace import register_op
from lfrns_hub.trace.adapters import list_adapters, register_adapter, widths
from lfrns_hub.units import SlimPlan, UnitGroup

__version__ = "0.1.0"

__all__ = [
    "LatencySetup",
    "Record",
    "SlimPlan",
    "UnitGroup",
    "analyse",
    "check",
    "find_units",
    "list_adapters",
    "load",
    "measure",
    "push",
    "register_adapter",
    "register_op",
    "retrain",
    "save",
    "slim",
    "widths",
]
