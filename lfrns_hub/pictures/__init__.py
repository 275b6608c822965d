"""Image data of a model: its input size, transforms and datasets by name, and whether model and data fit."""

from lfrns_hub.pictures.class_folders import list_classes
from lfrns_hub.pictures.decoding import PictureColumn, decode_picture, name_picture
from lfrns_hub.pictures.fit import check_images, guard_against_chance
from lfrns_hub.pictures.image_data import MAX_UNREADABLE, ImageData
from lfrns_hub.pictures.labels import read_labels
from lfrns_hub.pictures.load import load_data
from lfrns_hub.pictures.model_input import example_input, input_size_of, num_classes_of
from lfrns_hub.pictures.preparation import OwnPreparation, Preparation
from lfrns_hub.pictures.preprocessing import data_config_of, make_transform, set_preprocessing
from lfrns_hub.pictures.processor import (
    check_settings,
    find_processor,
    is_of_transformers,
    load_processor,
    write_processor,
)
from lfrns_hub.pictures.tables import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_FILES,
    as_files,
    find_column,
    find_labels,
    parquet_files,
    read_table,
    split_folder,
)

__all__ = [
    "IMAGE_COLUMNS",
    "LABEL_COLUMNS",
    "MAX_UNREADABLE",
    "SPLIT_FILES",
    "ImageData",
    "OwnPreparation",
    "PictureColumn",
    "Preparation",
    "as_files",
    "check_images",
    "check_settings",
    "data_config_of",
    "decode_picture",
    "example_input",
    "find_column",
    "find_labels",
    "find_processor",
    "guard_against_chance",
    "input_size_of",
    "is_of_transformers",
    "list_classes",
    "load_data",
    "load_processor",
    "make_transform",
    "name_picture",
    "num_classes_of",
    "parquet_files",
    "read_labels",
    "read_table",
    "set_preprocessing",
    "split_folder",
    "write_processor",
]
