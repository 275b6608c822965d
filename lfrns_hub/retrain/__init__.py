"""Retrain a slim model (or train a dense one): an Accelerate loop with warm-up, cosine and distillation."""

from lfrns_hub.retrain.choices import make_accelerator
from lfrns_hub.retrain.train import retrain

__all__ = ["make_accelerator", "retrain"]
