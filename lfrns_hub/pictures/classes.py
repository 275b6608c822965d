"""Classes of labels: the data's labels numbered like the model's classes, by name, or refused."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.model_io.batches import UNREADABLE, find_logits
from lfrns_hub.pictures.model_input import class_names_of, example_input
from lfrns_hub.pictures.tables import parquet_files, read_table

logger = logging.getLogger(__name__)
MAX_CLASSES = 1 << 20
WORDS = ("string", "large_string")  # names of the string type in datasets
WAYS_OUT = (
    "Name the classes in the model's order by class_map (lfrns: --class-map), or give a model with a head that fits "
    "(lfrns train makes one)."
)


@dataclass(frozen=True)
class Classes:
    """The classes of some data's labels.

    Attributes:
        names: Names in the order of the model's logits.
        numbers: Class of each label in the data; None where labels already are class numbers.
        call: Name of the call, for errors.
    """

    names: list[str]
    numbers: dict[Any, int] | None
    call: str

    @property
    def unknown(self) -> int:
        """Return the label of an image that cannot be read."""
        return UNREADABLE

    def read(self, labels: Iterable[Any]) -> list[int]:
        """Return the class of each label."""
        return [self.number(label) for label in labels]

    def number(self, label: Any) -> int:
        """Return the class of a label.

        Raises:
            ValueError: It is not the label of a class.
        """
        if self.numbers is None or type(label) is bool:
            if isinstance(label, int) and label >= 0:
                return _bounded(int(label), len(self.names) or MAX_CLASSES, self.call)
        elif label in self.numbers:
            return self.numbers[label]
        elif isinstance(label, int) and label >= 0:
            return _bounded(label, len(self.numbers), self.call)
        elif isinstance(label, str):
            raise ValueError(f"{self.call} holds label {short(label)!r}, which is no class of the model. {WAYS_OUT}")
        raise ValueError(
            f"{self.call} holds labels that are no class numbers (such as {short(str(label))}). Use a labelled split."
        )


def read_classes(
    table: Any,
    column: str,
    name: str,
    split: str,
    *,
    model: nn.Module | None,
    class_map: str | Path | None,
    streaming: bool = False,
) -> Classes:
    """Determine the class of each label of a split, the same in every split.

    Labels with names (folders, a ClassLabel, words) are matched by name with the class map, else with the model's names
    for its classes, else numbered as in the training split; words by their order. In a column of lists the items are
    matched; words in lists need a model or a class map with names.

    Args:
        table: The split.
        column: Its column of labels.
        name: The data: a folder or a Hub id.
        split: "train", "validation" or "test".
        model: The model with these classes; None: the data's own classes.
        class_map: Text file that names the classes in the model's order.
        streaming: Read only the schema.
    Raises:
        ValueError: The classes are not those of the model, or of the other split, and nothing shows their
            correspondence.
    """
    call = f"load_data({name!r}, {split!r}): the column {column!r}"
    stated, order, count = read_order(model, class_map)
    column_feature = table.features[column]  # another object at each access
    feature, listed = item_of(column_feature), item_of(column_feature) is not column_feature
    names = list(getattr(feature, "names", None) or [])
    if names:
        _refuse_other_numbers(name, split, column, names)
        known = names if streaming or _covers(order, names) else _of_training(name, split, column, names, call)
        labels: Sequence[Any] = range(len(names))
        if order is None and count is not None:
            _tell_of_two_orders(known, name, split, call)
    elif getattr(feature, "dtype", None) in WORDS:
        if streaming and order is None:
            raise ValueError(f"{call} holds words, and a stream cannot be looked through for all of them. {WAYS_OUT}")
        words = set(order) if streaming else set(_values(table, column))
        if not _covers(order, words):
            words |= _words_of_other(name, split, column)
            if all(word.isdecimal() for word in words):
                numbers = {word: int(word) for word in words}
                return Classes(_numbered(stated, count, numbers.values(), call), numbers, call)
        if listed and order is None:  # only the model's accuracy would show another order
            raise ValueError(
                f"{call} holds lists of words ({short(', '.join(sorted(words)))}), and the model does not name its "
                f"classes. {WAYS_OUT}"
            )
        labels = names = known = sorted(words)
    elif class_map is not None and any(line.isdecimal() for line in order):
        labels = range(len(order))
        names = known = [str(number) for number in labels]
    else:
        values = [] if streaming else [value for value in _values(table, column) if isinstance(value, int)]
        return Classes(_numbered(order, count, values, call), None, call)
    place, final = _match(known, order, count, call, by_map=class_map)
    return Classes(final, {label: place[name] for label, name in zip(labels, names, strict=True)}, call)


def read_order(
    model: nn.Module | None, class_map: str | Path | None
) -> tuple[list[str] | None, list[str] | None, int | None]:
    """Return a model's names for its outputs, or those of the class map if one is given, and their number.

    Raises:
        ValueError: The class map does not fit the model.
    """
    count, stated = count_classes(model), class_names_of(model) if model is not None else None
    if class_map is None:
        return stated, stated, count
    order = read_class_map(Path(class_map))
    if count is not None and len(order) != count:
        raise ValueError(
            f"class_map={str(class_map)!r}: it names {len(order)} classes, the model answers {count}. Name each of "
            "them on a line, in the order of the model's logits."
        )
    _refuse_contradiction(order, stated, class_map)
    return stated, order, count


def item_of(feature: Any) -> Any:
    """Return the feature of the items in a column of lists; for any other column the feature itself."""
    return getattr(feature, "feature", feature)


def is_same_name(name: str, other: str) -> bool:
    """Return whether two names are spellings of the same name."""
    return _plain(name) == _plain(other)


def _values(table: Any, column: str) -> Iterator[Any]:
    """Yield the labels of a split, for lists all their items; none for an image without labels."""
    for value in table[column]:
        yield from (one for one in (value if isinstance(value, list) else [value]) if one is not None)


def _covers(order: Sequence[str] | None, names: Iterable[str]) -> bool:
    """Return whether all names are names of the model."""
    return order is not None and set(map(_plain, names)) <= set(map(_plain, order))


def _numbered(order: Sequence[str] | None, count: int | None, labels: Iterable[int], call: str) -> list[str]:
    """Return names for classes that are labelled by numbers: the model's names, else the numbers."""
    most = count or (len(order) if order else MAX_CLASSES)
    largest = _bounded(max(labels, default=0), most, call)
    return list(order) if order else [str(number) for number in range(count or largest + 1)]


def count_classes(model: nn.Module | None) -> int | None:
    """Return the number of a model's classes; None where it is unknown, or where it has none."""
    if model is None:
        return None
    stated = getattr(model, "num_classes", None)
    if stated is None:
        stated = getattr(getattr(model, "config", None), "num_labels", None)
    if stated is None:
        try:
            with torch.no_grad():
                logits = find_logits(model(example_input(model)))
        except Exception:  # each model raises its own error; then its classes stay unknown
            return None
        stated = 0 if logits is None else logits.shape[1]
    return int(stated) or None


def number_names(names: Sequence[str], model: nn.Module, call: str) -> tuple[list[int], list[str]]:
    """Number the classes of some data, given by name, as a model does.

    Args:
        names: Names of the data's classes, by its own numbers.
        model: The model for the data.
        call: Name of the call, for the error.
    Returns:
        The model's number for each, and the names of all its classes.
    Raises:
        ValueError: They are not the model's classes.
    """
    place, final = _match(names, class_names_of(model), count_classes(model), call, by_map=None)
    return [place[name] for name in names], final


def read_class_map(path: Path) -> list[str]:
    """Read a file with one class name per line.

    Raises:
        ValueError: There is no such file, or it has a name twice.
    """
    if not path.is_file():
        raise ValueError(f"class_map={str(path)!r}: there is no such file. Give one that names a class on each line.")
    order = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(order)) < len(order):
        raise ValueError(
            f"class_map={str(path)!r}: names a class twice. Each class of the data stands on one line, once."
        )
    return order


def _match(
    names: Sequence[str], order: Sequence[str] | None, count: int | None, call: str, *, by_map: Any
) -> tuple[dict[str, int], list[str]]:
    """Return the number of each name, and the names of all classes by number.

    Args:
        names: Names of the data's classes, by the data's own numbers.
        order: Names in the order of the model, or of the class map.
        count: Number of the model's classes, if it is known.
        call: Name of the call, for the errors.
        by_map: The class map, which must have every name.
    """
    if order is None:
        if count is not None and count != len(names):
            raise ValueError(
                f"{call} has {len(names)} classes ({short(', '.join(names))}), the model answers {count}, and nothing "
                f"says which is which. {WAYS_OUT}"
            )
        return {name: number for number, name in enumerate(names)}, list(names)
    plain = [_plain(name) for name in order]
    found = {name: plain.index(_plain(name)) for name in names if plain.count(_plain(name)) == 1}
    missing = [name for name in names if name not in found]
    if by_map is not None and missing:
        raise ValueError(
            f"class_map={str(by_map)!r}: does not name {', '.join(map(repr, missing[:3]))}. Each class of the data "
            "stands on one line, once."
        )
    if not missing:
        return found, list(order)
    own = [_plain(name) for name in names]
    if own == plain:  # some of the model's names belong to several classes
        return {name: number for number, name in enumerate(names)}, list(order)
    if len(own) == len(plain) and not {*own} & {*plain}:  # different words throughout, and no sign of another order
        logger.warning(
            "%s and the model name their %d classes by other words, so they are taken in order: %r as %r, ... A class "
            "map (class_map; lfrns: --class-map) says which is which.", call, len(names), short(names[0]),
            short(order[0]),
        )  # fmt: skip
        return {name: number for number, name in enumerate(names)}, list(names)
    raise ValueError(
        f"{call} has {len(names)} classes, among them {missing[0]!r}, which is none of the model's {len(order)} "
        f"({short(', '.join(order))}). Name them alike, or name the data's classes in the model's order by class_map "
        "(lfrns: --class-map)."
    )


def _refuse_contradiction(order: Sequence[str], stated: Sequence[str] | None, class_map: Any) -> None:
    """Refuse a class map that has the model's own names in another order."""
    plain = [_plain(name) for name in stated or ()]
    for number, name in enumerate(order):
        if plain.count(_plain(name)) == 1 and plain.index(_plain(name)) != number:
            raise ValueError(
                f"class_map={str(class_map)!r}: it has {name!r} as class {number}, the model has it as class "
                f"{plain.index(_plain(name))}. Leave class_map out: the model's own names then say which is which."
            )


def _of_training(name: str, split: str, column: str, names: list[str], call: str) -> list[str]:
    """Return the class names in the order in which the training split numbers them."""
    files = parquet_files(Path(name), "train")
    training = _names_in(files[0], column) if files else names
    extra = next((each for each in names if each not in training), None)
    if training and extra is not None:
        raise ValueError(
            f"{call} has the class {extra!r}, which the training split lacks: its number is not known. {WAYS_OUT}"
        )
    return training or names


def _tell_of_two_orders(names: list[str], name: str, split: str, call: str) -> None:
    """Warn of class folders that timm and torchvision number differently, for a model whose classes have no names."""
    if names != sorted(names) and Path(name).is_dir() and not parquet_files(Path(name), split):
        first = next(number for number, pair in enumerate(zip(names, sorted(names), strict=True)) if len({*pair}) > 1)
        logger.warning(
            "%s: class %d is %r, as timm numbers folders, and not %r, as torchvision does; the model names no class. "
            "A class map (class_map; lfrns: --class-map) says otherwise.", call, first, short(names[first]),
            short(sorted(names)[first]),
        )  # fmt: skip


def _refuse_other_numbers(name: str, split: str, column: str, names: list[str]) -> None:
    """Refuse files of one split that number their classes differently: all are read with the first one's numbers."""
    for file in parquet_files(Path(name), split)[1:]:
        if (others := _names_in(file, column)) and others != names:
            raise ValueError(
                f"load_data({name!r}, {split!r}): {file.name} numbers the classes of {column!r} in another way than "
                f"the first file of the split ({short(', '.join(others))}). Write all files with one ClassLabel."
            )


def _names_in(file: Path, column: str) -> list[str]:
    """Return the class names that the schema of a parquet file states."""
    import datasets
    import pyarrow.parquet

    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    return list(getattr(item_of(features.get(column)), "names", None) or [])


def _words_of_other(name: str, split: str, column: str) -> set[str]:
    """Return the labels of the other split: training's for validation, and vice versa."""
    other = "validation" if split == "train" else "train"
    try:
        table = read_table(name, other)
    except ValueError:  # there is no such split
        return set()
    return set(_values(table, column)) if column in table.column_names else set()


def _bounded(label: int, most: int, call: str) -> int:
    """Refuse a label beyond the classes."""
    if label >= most:
        raise ValueError(
            f"{call} holds label {label}, a label must lie in [0, {most}). Number the classes from 0, without gaps, or "
            "give a model with a head that fits."
        )
    return label


def _plain(name: str) -> str:
    """Return a normalised name: case, spaces, hyphens and underscores are ignored."""
    return "_".join(str(name).casefold().replace("-", " ").replace("_", " ").split())
