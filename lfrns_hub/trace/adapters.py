"""Facts that tracing cannot see, as a table by class: attributes that state a width, forwards that cannot narrow."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Adapter:
    """Facts of a module class that tracing cannot see.

    Attributes:
        cls: Full name of the class.
        heads: Integer attributes that shrink in proportion to the removed heads.
        frozen_heads: Why its forward cannot lose heads, or None.
        if_stated: Skip a module that has none of the attributes: another release of the library built it.
    """

    cls: str
    heads: tuple[str, ...] = ()
    frozen_heads: str | None = None
    if_stated: bool = False


ADAPTERS: dict[str, Adapter] = {}


def widths(*attributes: str) -> tuple[str, ...]:
    """Return the names of the integer attributes that state a width, for `register_adapter`.

    Args:
        attributes: Names of attributes of the module that shrink in proportion to its heads.
    Returns:
        The names.

    Example:
        >>> widths("num_heads", "inner_dim")
        ('num_heads', 'inner_dim')
    """
    return attributes


def register_adapter(cls: str, *, heads: tuple[str, ...] = (), frozen_heads: str | None = None) -> None:
    """Register facts of a module class that tracing cannot see.

    Args:
        cls: Full name of the class, "package.module.Class".
        heads: Integer attributes that must follow when attention heads are removed, given by `widths(...)`.
        frozen_heads: The reason that users read, where the forward hard-codes its width.
    Raises:
        ValueError: `cls` has no module name.

    Example:
        >>> register_adapter("mylib.MyAttention", heads=widths("num_heads", "inner_dim"))
        >>> "mylib.MyAttention" in list_adapters()
        True
    """
    if "." not in cls:
        raise ValueError(f"register_adapter({cls!r}): give the class with its module, as in 'timm.layers.Attention'.")
    ADAPTERS[cls] = Adapter(cls, tuple(heads), frozen_heads)


def list_adapters() -> list[str]:
    """Return the classes that have an adapter, by their full names, ascending.

    Example:
        >>> "timm.layers.attention.Attention" in list_adapters()
        True
    """
    return sorted(ADAPTERS)


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_owner(model: nn.Module, layer: str) -> tuple[str, Adapter] | None:
    """Find the nearest module around a layer that has an adapter."""
    name = layer
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        adapter = ADAPTERS.get(class_name(module))
        if adapter is not None and not (adapter.if_stated and vars(module).keys().isdisjoint(adapter.heads)):
            return name, adapter
    return None


def find_adapter(model: nn.Module, layer: str) -> Adapter | None:
    """Find the adapter of the nearest module around a layer."""
    owner = find_owner(model, layer)
    return owner[1] if owner else None


register_adapter("timm.layers.attention.Attention", heads=widths("num_heads", "attn_dim"))
register_adapter("timm.layers.attention.AttentionRope", heads=widths("num_heads", "attn_dim"))

# Attention reads its widths from the weights; the number of heads is set nevertheless. In older releases these classes
# do not state it: their submodules do, and use it, as the graph shows.
for model, prefix in (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")):
    cls = f"transformers.models.{model}.modeling_{model}.{prefix}Attention"
    ADAPTERS[cls] = Adapter(cls, widths("num_attention_heads"), if_stated=True)
