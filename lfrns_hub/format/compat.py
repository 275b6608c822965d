"""Differences between releases of our dependencies, and how they are handled: no other file depends on them.

Checkpoints contain a copy of this file, so it imports nothing of the package.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import transformers
from torch import nn

# transformers renamed parts of its models after 5.0 (tensors in files keep the older names): the older name and the
# newer. Each pair is applied to the result of the pairs before it.
_ATTENTION = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
_MLP = (("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"))
_VIT = (("encoder.layer.", "layers."), *_ATTENTION, *_MLP)
RENAMED = {
    **dict.fromkeys(("deit", "ijepa", "vit", "vit_msn"), _VIT),
    "beit": (
        *_VIT,
        ("encoder.relative_position_bias.", "shared_position_bias."),
        (".attention.attention.relative_position_bias.", ".relative_position_bias."),
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _ATTENTION),
}
# The number of heads was one module deeper, next to their total width.
INSIDE, ALL_HEADS = ".attention", "all_head_size"


def vit_processor() -> type:
    """Return the class that AutoImageProcessor opens for ViT, the tensor-based one: its name ended in Fast."""
    from transformers.models import vit

    try:
        has_fast = find_spec(f"{vit.__name__}.image_processing_vit_fast") is not None
    except ValueError:  # releases in between keep the module's name alone, without a file
        has_fast = False
    return vit.ViTImageProcessorFast if has_fast else vit.ViTImageProcessor


class Classes(tuple):
    """Several classes of one type: the pipelines of 5.0 read `__name__` of a registered class, even of a tuple."""

    __name__ = "classes"


def names_here(
    model: nn.Module, config: Any, shapes: dict[str, Any], attrs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate stated sizes to this release's names of a model's parts; another release may have stated them.

    Args:
        model: The dense skeleton of a transformers model.
        config: Its narrow config.
        shapes: Shape by parameter or buffer name.
        attrs: By module name and attribute, an int or a list of ints.
    Returns:
        The same by the model's own names.
    Raises:
        ValueError: Another release stated a part that has no name in this one.
    """
    if not (isinstance(shapes, dict) and isinstance(attrs, dict)):
        return shapes, attrs  # untrusted input, refused by `narrow` by name
    modules = dict(model.named_modules(remove_duplicate=False))
    if not _strangers(shapes, modules) and all(_states(modules.get(name), values) for name, values in attrs.items()):
        return shapes, attrs
    pairs = RENAMED.get(config.model_type.removeprefix("lfrns_"), ())

    def spellings(name: str) -> list[str]:
        newer = older = name
        for old, new in pairs:
            newer = newer.replace(old, new)
        for old, new in reversed(pairs):
            older = older.replace(new, old)
        return [name, newer, older]

    shapes = {next((n for n in spellings(k) if not _strangers([n], modules)), k): shape for k, shape in shapes.items()}
    written = getattr(config, "transformers_version", None)
    if (unknown := _strangers(shapes, modules)) and written not in (None, transformers.__version__):
        raise ValueError(
            f"{type(model).__name__}: the checkpoint was written by transformers {written}, and its {unknown[0]} has "
            f"no name in {transformers.__version__}. Install that release, or one nearer to it."
        )
    said = {}
    for name, values in attrs.items():
        names = spellings(name)
        names += [n + INSIDE for n in names] + [n.removesuffix(INSIDE) for n in names]
        owner = next((n for n in names if _states(modules.get(n), values)), name)
        said[owner] = {k: v for k, v in values.items() if k != ALL_HEADS or k in vars(modules.get(owner, model))}
    for name, module in modules.items():  # with the newer names only the weights may show the number of heads
        rows = shapes.get(f"{name}.query.weight")
        if ALL_HEADS in vars(module) and isinstance(rows, list) and rows and isinstance(rows[0], int):
            heads = rows[0] // module.attention_head_size
            said[name] = {**said.get(name, {}), "num_attention_heads": heads, ALL_HEADS: rows[0]}
    return shapes, said


def _strangers(names: Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """Return the tensors whose module does not exist in the model."""
    return [name for name in names if name.rpartition(".")[0] not in modules]


def _states(module: nn.Module | None, values: Any) -> bool:
    """Return whether a module has the attributes, except one that newer releases do not have."""
    return module is not None and isinstance(values, dict) and values.keys() - {ALL_HEADS} <= vars(module).keys()
