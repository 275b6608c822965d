"""The public call that is running, for error messages: set on entry, so that no function needs to pass it on."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_CALL: ContextVar[str | None] = ContextVar("call", default=None)


def public(function: Function) -> Function:
    """Decorate a public function, which `call` names while it runs; for nested calls, the outer one.

    Example:
        >>> @public
        ... def greet():
        ...     return f"{call()}(): hello"
        >>> greet()
        'greet(): hello'
    """

    @functools.wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        if _CALL.get() is not None:
            return function(*arguments, **options)
        token = _CALL.set(function.__qualname__)
        try:
            return function(*arguments, **options)
        finally:
            _CALL.reset(token)

    return named


def call(default: str = "lfrns_hub") -> str:
    """Return the name of the public function that the user called."""
    return _CALL.get() or default
