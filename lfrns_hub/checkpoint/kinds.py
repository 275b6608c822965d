"""Layout of a checkpoint, as its config.json states it: the library that builds the model, and how it is loaded."""

from typing import Any, Literal

from lfrns_hub.checkpoint.entrypoint import TIMM_NAME
from lfrns_hub.checkpoint.narrow_classes import CLASS_PREFIX, TYPE_PREFIX

OWN_NAME = "lfrns_own_class"  # architecture of a model that its user builds
WRAPPERS = tuple(CLASS_PREFIX + name for name in ("TimmWrapperForImageClassification", "TimmWrapperModel"))


def kind_of(config: dict[str, Any]) -> Literal["timm", "timm_wrapper", "transformers", "own"] | None:
    """Return the kind of checkpoint that a config.json belongs to, None if it is not ours.

    Args:
        config: Content of the file, from an untrusted source.

    Example:
        >>> kind_of({"model_type": "lfrns_vit"}), kind_of({"model_type": "vit"})
        ('transformers', None)
    """
    architecture, classes = config.get("architecture"), config.get("architectures")
    if architecture == TIMM_NAME:
        is_wrapped = isinstance(classes, list) and any(name in WRAPPERS for name in classes)
        return "timm_wrapper" if is_wrapped else "timm"
    if str(config.get("model_type", "")).startswith(TYPE_PREFIX):
        return "transformers"
    return "own" if architecture == OWN_NAME else None
