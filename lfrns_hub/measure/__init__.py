"""What a model scores and what it costs: accuracy, parameters, MACs, latency, and the Record that keeps them."""

from lfrns_hub.answers import check_labels
from lfrns_hub.measure.compare import measure
from lfrns_hub.measure.counting import count_macs, count_params
from lfrns_hub.measure.latency import cpu_name, measure_latency
from lfrns_hub.measure.record import Record, format_table
from lfrns_hub.measure.score import evaluate, prepare_loader
from lfrns_hub.running import evaluating

__all__ = [
    "Record",
    "check_labels",
    "count_macs",
    "count_params",
    "cpu_name",
    "evaluate",
    "evaluating",
    "format_table",
    "measure",
    "measure_latency",
    "prepare_loader",
]
