"""Plots for cards: widths, budgets, timings, clusters (the last are imported by their own path: they run the model)."""

from lfrns_hub.plots.charts import COLOURS, mark_of, plot_bench, plot_ladder, plot_widths, shows_plan

__all__ = ["COLOURS", "mark_of", "plot_bench", "plot_ladder", "plot_widths", "shows_plan"]
