"""What torch.compile is told about functions, without loading torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """`function` itself, marked as torch.compiler.assume_constant_result marks it: while it traces, torch.compile calls
    the function and keeps what it returns. torch's decorator imports torch._dynamo, which takes as long as torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
