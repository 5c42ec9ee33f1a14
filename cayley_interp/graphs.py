"""What torch.compile is told of this package's functions."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_in_graphs(function: Function) -> Function:
    """A table that depends on constants alone: a compiled model holds it, rather than make it in every forward pass.

    This is torch.compiler.assume_constant_result without its import of the compiler: 140 MB, and two seconds.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function
