"""The typer app, and how a class of options becomes one of its commands."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import Parameter, Signature
from types import UnionType
from typing import Any, TypeVar, get_args

import typer

app = typer.Typer(
    help="Slim vision models: find redundant units, remove them, retrain. Each command's --help shows examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Options = TypeVar("Options", bound=type)
METAVARS = {int: "N", float: "X", tuple[float, float, float]: "X X X", str: "TEXT", list[str]: "NAME"}


def command_error() -> type[Exception]:
    """Return what typer raises of arguments that it refuses: up to 0.23 it was click's."""
    if hasattr(typer, "TyperException"):
        return typer.TyperException
    from click import ClickException

    return ClickException


def command(body: str, *examples: str, panel: str, passes_on: bool = False) -> Callable[[Options], Options]:
    """Make a dataclass a command: its name in lower case, its docstring the help, its fields the options.

    A field that is itself a dataclass is a bundle: each of its fields is an option. What is required comes first in the
    help; otherwise the order is that of the fields.

    Args:
        body: "module:function" in lfrns_hub/cli: called with the options, once they are checked; returns None or an
            exit code. It is imported then.
        examples: Command lines to copy, at the end of the help.
        panel: The command's panel in `lfrns --help`.
        passes_on: Whether what follows the first argument belongs to something else, options included.
    """

    def add(options: Options) -> Options:
        app.command(
            options.__name__.lower(),
            help=inspect.getdoc(options),
            epilog="\n\n".join(["[bold]Examples[/bold]", *examples]),
            rich_help_panel=panel,
            context_settings={"allow_interspersed_args": not passes_on},
        )(reader(options, body))
        return options

    return add


def reader(options: type, body: str) -> Callable[..., Callable[[], Any]]:
    """Return what typer calls with the values of all options: it checks them and returns the work to do."""

    def read(**given: Any) -> Callable[[], Any]:
        return partial(call, body, _build(options, given))

    required_first = sorted(_parameters(options), key=lambda one: one.default is not Parameter.empty)
    read.__signature__ = Signature(required_first)
    return read


def _parameters(options: type) -> list[Parameter]:
    """Return the options of a dataclass and of the bundles in it, as a function would take them."""
    taken = []
    for one in inspect.signature(options).parameters.values():
        if is_dataclass(one.annotation):
            taken += _parameters(one.annotation)
            continue
        kinds, *declared = get_args(one.annotation)
        for option in declared:  # short, as help has 80 columns
            option.metavar = option.metavar or next(
                (METAVARS[kind] for kind in METAVARS if kind in _kinds(kinds)), None
            )
        taken.append(one.replace(kind=Parameter.KEYWORD_ONLY))
    return taken


def _kinds(kinds: Any) -> tuple[Any, ...]:
    """Return the types that an option may have, of a union each."""
    return get_args(kinds) if isinstance(kinds, UnionType) else (kinds,)


def _build(options: type, given: dict[str, Any]) -> Any:
    """Build a dataclass, and the bundles in it, of the values of all options."""
    values = {}
    for field in fields(options):
        values[field.name] = _build(field.type, given) if is_dataclass(field.type) else given[field.name]
    return options(**values)


def call(body: str, options: Any) -> Any:
    """Import the function that does a command's work, lfrns_hub/cli, and call it with the options."""
    module, _, function = body.partition(":")
    return getattr(importlib.import_module(f"lfrns_hub.cli.{module}"), function)(options)
