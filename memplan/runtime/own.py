"""memplan's own ops: the dispatcher finds their kernels, and Programs call them without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

KERNELS: dict[Any, Callable[..., Any]] = {}  # by overload


def kernel(schema: str) -> Callable[[_Function], _Function]:
    """Defines the op ``memplan::schema`` with the decorated function as its kernel on every device: one without effects,
    whose results are new and the same for the same operands.

    torch.library.custom_op checks at every call that no result shares memory with an operand, which takes as long as
    several small products; here that is the function's own word, and the tests' (``torch.library.opcheck``).
    """
    name, _, signature = schema.partition("(")
    qualified = f"memplan::{name}"

    def define(function: _Function) -> _Function:
        torch.library.define(qualified, "(" + signature)
        torch.library.impl(qualified, "default")(function)
        KERNELS[getattr(torch.ops.memplan, name).default] = function
        return function

    return define
