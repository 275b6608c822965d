"""Dense models by name, with their weights."""

from lfrns_hub.pictures import (
    ImageData,
    check_images,
    example_input,
    guard_against_chance,
    input_size_of,
    load_data,
    make_transform,
    num_classes_of,
    set_preprocessing,
)
from lfrns_hub.zoo.dense import create_base, create_dense, create_for_data, create_skeleton, origin_of, starts_random
from lfrns_hub.zoo.weights import read_weights

__all__ = [
    "ImageData",
    "check_images",
    "create_base",
    "create_dense",
    "create_for_data",
    "create_skeleton",
    "example_input",
    "guard_against_chance",
    "input_size_of",
    "load_data",
    "make_transform",
    "num_classes_of",
    "origin_of",
    "read_weights",
    "set_preprocessing",
    "starts_random",
]
