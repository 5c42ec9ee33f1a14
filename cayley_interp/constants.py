"""Tables that a compiled model takes as they are, in place of tracing how they are made in every forward pass."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_compiled(make: Function) -> Function:
    """What torch.compiler.assume_constant_result does; that imports all of torch's compiler, a second at every start.

    Under the compiler `make` may give tensors, numbers and plain tuples of them.
    """
    make._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return make
