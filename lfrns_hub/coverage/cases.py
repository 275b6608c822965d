"""The networks that `lfrns coverage` tries, selected by name and built with random weights."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.layers import convert_splitbn_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from lfrns_hub.coverage.families import (
    CONVNET_SIZE,
    NOT_IMAGES,
    THIRD_PARTY,
    TIMM_ARGS,
    TIMM_CONVNETS,
    TIMM_HYBRIDS,
    TIMM_SIZES,
    TIMM_VITS,
    TRANSFORMERS_CONVNETS,
    TRANSFORMERS_VITS,
    VARIANTS,
)
from lfrns_hub.zoo import create_skeleton, input_size_of

SECTIONS = (
    "timm convnets",
    "timm ViTs",
    "timm hybrids",
    "transformers convnets",
    "transformers ViTs",
    "option variants",
    "third-party",
    "named",
)


@dataclass(frozen=True)
class Case:
    """One network to try.

    Attributes:
        section: One of SECTIONS.
        family: timm's module, transformers' model type, or the package.
        model: timm name, model type, "package.module:function", or any name that `lfrns units` accepts.
        kind: The builder: "timm", "transformers", "function", or "name" for zoo.create_skeleton.
        args: Arguments that differ from the model's own.
        size: Side of the image in pixels; None is the model's own.
        option: Description of a variant.
    """

    section: str
    family: str
    model: str
    kind: str = "timm"
    args: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    option: str = ""

    @property
    def title(self) -> str:
        """The name of the model with the arguments that differ from its own.

        Example:
            >>> Case("timm convnets", "vgg", "vgg11", args={"mlp_ratio": 0.25}).title
            'vgg11(mlp_ratio=0.25)'
        """
        if self.kind == "transformers":
            return f"{self.model}, small configuration"
        text = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        name = self.model.removeprefix(f"{__name__}:")
        return f"{name}({text})" if text else name


def list_cases(*, variants: bool = True) -> list[Case]:
    """Return all networks of the tables that the installed packages have, and families that are in no table.

    Args:
        variants: Whether to include the option variants.
    """
    cases = [*_timm_cases(), *_transformers_cases()]
    if variants:
        for family, options in VARIANTS.items():
            for option, model, args in options:
                kind = "function" if ":" in model else "timm"
                cases.append(
                    Case("option variants", family, model, kind, args, TIMM_SIZES.get(model, CONVNET_SIZE), option)
                )
    for family, model, args, size in THIRD_PARTY:
        if importlib.util.find_spec(model.partition(".")[0].partition(":")[0]):
            cases.append(Case("third-party", family, model, "function", args, size))
    return cases


def select_cases(patterns: Sequence[str], *, variants: bool = True, size: int | None = None) -> list[Case]:
    """Return networks selected by name.

    Args:
        patterns: Globs of a family, a model or a section of the tables; if they match none, of timm's models; or
            any other name that `lfrns units` accepts ("package.module:function", a folder). Empty: all tables.
        variants: Whether to include the option variants.
        size: Side of the image in pixels, instead of the tables'.
    Returns:
        The networks, each once, in the order of the tables.
    Raises:
        ValueError: A glob matches nothing.

    Example:
        >>> [case.model for case in select_cases(["test_resnet"])]
        ['test_resnet']
    """
    listed = list_cases(variants=variants)
    chosen: list[Case] = [] if patterns else listed
    for pattern in patterns:
        hits = [c for c in listed if any(fnmatchcase(name, pattern) for name in (c.family, c.model, c.section))]
        chosen += [case for case in hits or _named(pattern) if case not in chosen]
    order = {id(case): place for place, case in enumerate(listed)}
    chosen.sort(key=lambda case: order.get(id(case), len(order)))
    return [Case(**{**vars(case), "size": size}) for case in chosen] if size else chosen


def build(case: Case) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build a network with random weights and offline, and return its input size.

    Returns:
        The model in eval mode, and channels, height and width.

    Example:
        >>> build(Case("named", "resnet", "test_resnet", size=64))[1]
        (3, 64, 64)
    """
    if case.kind == "timm":
        model = timm.create_model(case.model, pretrained=False, **case.args)
    elif case.kind == "transformers":
        names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[case.model]
        first = names if isinstance(names, str) else names[0]
        config = AutoConfig.for_model(case.model, num_labels=10, architectures=[first], **case.args)
        model = AutoModelForImageClassification.from_config(config)
    elif case.kind == "function":
        module, _, function = case.model.partition(":")
        model = getattr(importlib.import_module(module), function)(**case.args)
    else:
        model = create_skeleton(case.model)
    channels, height, width = input_size_of(model)
    return model.eval(), (channels, case.size or height, case.size or width)


def build_sequential(num_classes: int = 10) -> nn.Module:
    """Build a classifier that consists only of layers in sequence."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(48 * 16, 64),
        nn.GELU(),
        nn.Linear(64, num_classes),
    )


def build_split_batch_norm(name: str) -> nn.Module:
    """Build a timm model with split batch norms: in training half of the batch goes through separate norms."""
    return convert_splitbn_model(timm.create_model(name, pretrained=False), 2)


def _timm_cases() -> Iterator[Case]:
    """Yield the smallest model of every module of the installed timm."""
    tables = dict(zip(SECTIONS, (TIMM_CONVNETS, TIMM_VITS, TIMM_HYBRIDS), strict=False))
    # Others, including this package, register models with timm: only timm's own modules are its families.
    installed = [name for name in timm.list_modules() if hasattr(timm.models, name) and timm.list_models(module=name)]
    for section, table in tables.items():
        for family in [module for module in installed if module in table]:
            model = table[family]
            size = TIMM_SIZES.get(model, CONVNET_SIZE if table is TIMM_CONVNETS else None)
            yield Case(section, family, model, "timm", TIMM_ARGS.get(model, {}), size)
    for family in installed:
        if not any(family in table for table in tables.values()):
            yield Case("timm hybrids", family, _smallest(family), option="new in this timm, not sorted")


def _smallest(family: str) -> str:
    """Return the smallest model of a timm module by building all of them on the meta device."""
    names = timm.list_models(module=family)
    sizes = {}
    for name in [name for name in names if not name.startswith("test_")]:
        with torch.device("meta"), contextlib.suppress(Exception):  # a model that cannot be built is not the smallest
            sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    return min(sizes, key=sizes.__getitem__, default=names[0])


def _transformers_cases() -> Iterator[Case]:
    """Yield every type of transformers' image classifiers that has images as input."""
    tables = {"transformers convnets": TRANSFORMERS_CONVNETS, "transformers ViTs": TRANSFORMERS_VITS}
    for section, table in tables.items():
        for name, (size, args) in table.items():
            if name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
                yield Case(section, name, name, "transformers", args, size)
    for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        if not any(name in table for table in tables.values()) and name not in NOT_IMAGES:
            option = "new in this transformers, not sorted, its default configuration"
            yield Case("transformers ViTs", name, name, "transformers", option=option)


def _named(pattern: str) -> list[Case]:
    """Return the networks of a pattern that are in no table."""
    names = timm.list_models(pattern) if any(mark in pattern for mark in "*?[") else [pattern]
    if not names:
        raise ValueError(
            f"coverage({pattern!r}): matches no family, no model of the tables and no model of timm. "
            "`lfrns coverage` without a pattern tries all; timm.list_models() names timm's."
        )
    cases = []
    for name in names:
        known = timm.is_model(name)
        kind = "timm" if known else "function" if ":" in name and not name.startswith("hf") else "name"
        family = timm.models.get_arch_name(name) if known else name.partition(".")[0].partition(":")[0]
        cases.append(Case("named", family, name, kind))
    return cases
