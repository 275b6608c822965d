"""Measurements of a model: accuracy, parameters, MACs, latency, and the Record of them."""

from lfrns_hub.measure.compare import measure, measure_each
from lfrns_hub.measure.counting import count_macs, count_params
from lfrns_hub.measure.figures import KINDS, heads_of, main_figure, main_figures, nearness, word_of
from lfrns_hub.measure.latency import cpu_name, describe_setup, forward_passes, measure_latency, take_turns, wait_for
from lfrns_hub.measure.occasion import (
    COUNTED,
    comparable_budgets,
    comparable_controls,
    comparable_dense,
    same_occasion,
    weights_id,
    why_no_dense,
)
from lfrns_hub.measure.record import Record, format_table
from lfrns_hub.measure.score import evaluate
from lfrns_hub.model_io.model import evaluating

__all__ = [
    "COUNTED",
    "KINDS",
    "Record",
    "comparable_budgets",
    "comparable_controls",
    "comparable_dense",
    "count_macs",
    "count_params",
    "cpu_name",
    "describe_setup",
    "evaluate",
    "evaluating",
    "format_table",
    "forward_passes",
    "heads_of",
    "main_figure",
    "main_figures",
    "measure",
    "measure_each",
    "measure_latency",
    "nearness",
    "same_occasion",
    "take_turns",
    "wait_for",
    "weights_id",
    "why_no_dense",
    "word_of",
]
