"""Code shared by the recipes: their options, the output folder, their start and end, and the results of a run."""

from lfrns_hub.recipe.folder import (
    begin_run,
    check_output_dir,
    check_same_run,
    is_finished,
    load_weights,
    save_trained,
    save_weights,
    tidy,
)
from lfrns_hub.recipe.options import kept_fraction, recipe_parser, whole_number
from lfrns_hub.recipe.program import finish, hold, open_run, publish, run
from lfrns_hub.recipe.results import (
    control_row,
    describe_command,
    describe_data,
    describe_run,
    draw_clusters,
    make_controls,
    print_results,
    random_cut,
    random_plan,
    run_controls,
    without_folders,
)

__all__ = [
    "begin_run",
    "check_output_dir",
    "check_same_run",
    "control_row",
    "describe_command",
    "describe_data",
    "describe_run",
    "draw_clusters",
    "finish",
    "hold",
    "is_finished",
    "kept_fraction",
    "load_weights",
    "make_controls",
    "open_run",
    "print_results",
    "publish",
    "random_cut",
    "random_plan",
    "recipe_parser",
    "run",
    "run_controls",
    "save_trained",
    "save_weights",
    "tidy",
    "whole_number",
    "without_folders",
]
