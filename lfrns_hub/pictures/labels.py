"""A column of labels, read by the meaning of the model's outputs: class numbers, multi-label classes, or quantities.

N images, K outputs of the model.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfrns_hub.format.untrusted import short
from lfrns_hub.model_io.batches import UNREADABLE
from lfrns_hub.model_io.meaning import PROBLEMS, Features, LabelForm, Labelled, Labels, Quantities, said_meaning
from lfrns_hub.pictures.classes import WORDS, Classes, is_same_name, item_of, read_classes, read_order

# The labels that each meaning accepts, for errors.
TAKEN = {
    "classes": "one class a picture",
    "labels": "a list of classes, or a row of 0 and 1, a picture",
    "quantities": "a number for each output",
}
SAY_IT = (
    "Set problem_type to 'multi_label_classification' for labels that hold together or to 'regression' for quantities, "
    "in the model's config.json or on the model that your function builds, or name another column by label_column "
    "(lfrns: --label-column)."
)


@dataclass(frozen=True)
class LabelRows:
    """Labels other than a single class, as floating-point tensors.

    Attributes:
        names: Names of the model's outputs; empty if its quantities have no names.
        number: Function from the label in the data to a tensor, a scalar or [K].
        unknown: The label of an image that cannot be read.
        meaning: Meaning of the outputs.
        width: K.
        call: Name of the call, for errors.
        sure: Whether the model states the meaning of its outputs; else the numbers must show it.
    """

    names: list[str]
    number: Callable[[Any], Tensor]
    unknown: Tensor
    meaning: Labelled
    width: int
    call: str
    sure: bool = True

    def read(self, values: Iterable[Any]) -> list[Tensor]:
        """Return the labels of images.

        Raises:
            ValueError: They do not fit the outputs.
        """
        rows = [self.number(value) for value in values]
        if not rows:
            return rows
        stacked = torch.stack(rows)
        try:
            if not self.sure and not isinstance(LabelForm.of(stacked).meaning(self.width, self.width == 1), Quantities):
                raise ValueError("nothing says whether the numbers are quantities, labels or classes.")
            self.meaning.read_labels(stacked, self.width)
        except ValueError as error:
            raise ValueError(f"{self.call}: {error}{'' if self.sure else f' {SAY_IT}'}") from None
        return rows


def holds_classes(feature: Any, model: nn.Module | None) -> bool:
    """Return whether a column has one class per image, by its datasets feature and by the model's stated meaning."""
    said = said_meaning(model) if model is not None else None
    is_float = str(getattr(feature, "dtype", "")).startswith("float")
    return item_of(feature) is feature and not is_float and not isinstance(said, (Labels, Quantities))


def read_labels(
    table: Any,
    column: str,
    name: str,
    split: str,
    *,
    model: nn.Module | None,
    class_map: str | Path | None,
    streaming: bool = False,
) -> Classes | LabelRows | None:
    """Determine the meaning of a split's labels.

    One class per image is read by `read_classes`. If the model's problem_type is multi_label_classification, lists of K
    numbers from 0 to 1 are rows of labels; other lists name the true classes, which are matched like single classes.
    If it is regression, numbers or lists of K numbers are quantities; so are floating-point ones where the model
    states nothing and K fits.

    Args:
        As for `read_classes`.
    Returns:
        A reader of the labels; None where the labels are not classes and the model returns features.
    Raises:
        ValueError: The labels do not fit the meaning of the model's outputs, or their meaning is unknown.
    """
    feature, given = table.features[column], {"model": model, "class_map": class_map, "streaming": streaming}
    if holds_classes(feature, model):
        return read_classes(table, column, name, split, **given)
    item, call = item_of(feature), f"load_data({name!r}, {split!r}): the column {column!r}"
    names, dtype, listed = getattr(item, "names", None), str(getattr(item, "dtype", "")), item is not feature
    whole, is_float = dtype.startswith(("int", "uint")) and not names, dtype.startswith("float")
    shown = f"{call} holds {'lists of ' if listed else ''}{'classes' if names else short(dtype or str(item))}"
    if model is None:
        raise ValueError(f"{shown}, and only a model's problem_type says what they mean. Pass the model.")
    said = said_meaning(model)
    if isinstance(said, Features):
        return None
    _, order, width = read_order(model, class_map)
    if width is None or not isinstance(said, Labelled | None):
        raise ValueError(f"{shown}, and the model does not answer with one row of outputs. {SAY_IT}")
    if isinstance(said, Labels) and width == 1 and len(names or ()) == 2 and not listed:
        classes = read_classes(table, column, name, split, model=None, class_map=None, streaming=streaming)
        number = partial(_yes_or_no, classes, _find_yes(classes, order))
        return LabelRows(order or classes.names[1:], number, _unknown((), said), said, width, call)
    if isinstance(said, Labels) and listed and (names or dtype in (*WORDS, "null") or whole):
        if not (whole and _are_rows(table, column, width, streaming, call)):
            classes = read_classes(table, column, name, split, **given)
            number = partial(_mark, classes, width)
            return LabelRows(classes.names, number, _unknown((width,), said), said, width, call)
    numeric = is_float or whole or dtype == "bool"
    if not (is_float if said is None else numeric and (listed or said.name != "classes")):
        raise ValueError(f"{shown}, and {_takes(said)}. {SAY_IT}")
    meaning = said or Quantities()
    unknown = _unknown((width,) if listed else (), meaning)
    outputs = order or ([] if isinstance(meaning, Quantities) else [str(number) for number in range(width)])
    return LabelRows(outputs, partial(_as_numbers, unknown, call), unknown, meaning, width, call, said is not None)


def _takes(said: Labelled | None) -> str:
    """Return which labels a model accepts, in its own words."""
    if said is None:
        return "the model has no problem_type that says what they mean"
    word = next(word for word, meaning in PROBLEMS.items() if meaning.name == said.name)
    return f"the model's problem_type {word!r} takes {TAKEN[said.name]}"


def _unknown(shape: tuple[int, ...], meaning: Labelled) -> Tensor:
    """Return the label of an image that cannot be read: -100 everywhere, or NaN for quantities, which may be -100."""
    return torch.full(shape, float("nan") if isinstance(meaning, Quantities) else float(UNREADABLE))


def _are_rows(table: Any, column: str, width: int, streaming: bool, call: str) -> bool:
    """Return whether lists of integers are rows of 0 and 1, rather than numbers of the true classes.

    Only rows of up to two labels are ambiguous: the numbers of three classes are not all 0 or 1.
    """
    if getattr(table.features[column], "length", -1) == width:
        return True
    if streaming:
        raise ValueError(
            f"{call} holds lists of whole numbers, and a stream cannot be looked through for what they are. Store rows "
            f"of 0 and 1 as lists of fixed length {width}, and classes as a Sequence of ClassLabel."
        )
    lists = [value for value in table[column] if value is not None]
    rows = all(len(value) == width and {0, 1, UNREADABLE, None}.issuperset(value) for value in lists)
    if rows and all(len(set(value)) == width and set(value) == set(range(width)) for value in lists):
        raise ValueError(
            f"{call} holds lists of {width} whole numbers that can be rows of 0 and 1 or the classes that hold. Store "
            "rows as float32, and classes as a Sequence of ClassLabel."
        )
    return rows


def _find_yes(classes: Classes, order: list[str] | None) -> int:
    """Return the class that is the model's single label: by its name, else the second of two."""
    same = [number for number, name in enumerate(classes.names) if order is None or is_same_name(order[0], name)]
    if len(classes.names) != 2 or not same:
        raise ValueError(
            f"{classes.call} has the classes {short(', '.join(classes.names))}, and the model has one label"
            f"{f', {short(order[0])!r}' if order else ''}: two classes are needed, one of them of that name."
        )
    return same[-1]


def _yes_or_no(classes: Classes, yes: int, value: Any) -> Tensor:
    """Return 1 for the class that is the model's single label, 0 for the other."""
    return torch.tensor(float(classes.number(value) == yes))


def _mark(classes: Classes, width: int, value: Any) -> Tensor:
    """Return a row [K] with 1 for each of the true classes."""
    if value is None:
        raise ValueError(
            f"{classes.call} holds no list for some pictures. Use a labelled split; an empty list says that no label "
            "holds."
        )
    numbers = [classes.number(label) for label in value]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{classes.call} holds {short(str(value))}, which names a class twice. Give each class that holds once, or "
            f"rows of {width} numbers, 0 or 1."
        )
    row = torch.zeros(width)
    row[numbers] = 1
    return row


def _as_numbers(unknown: Tensor, call: str, value: Any) -> Tensor:
    """Return a number, or a list of K, as a tensor; missing values are unknown."""
    if unknown.ndim and value is not None and len(value) != len(unknown):
        raise ValueError(
            f"{call} holds {short(str(value))}, a list of {len(value)}, and the model has {len(unknown)} outputs: give "
            "a number for each of them, or set another problem_type."
        )
    if value is None:
        return unknown
    numbers = [unknown.flatten()[0].item() if one is None else one for one in (value if unknown.ndim else [value])]
    return torch.tensor(numbers, dtype=torch.float32).reshape(unknown.shape)
