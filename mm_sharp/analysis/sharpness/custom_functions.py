"""Functions with a backward pass of their own in a loss's graph (ours).

``torch.autograd.Function`` has whatever derivative its author wrote. One that is marked ``@once_differentiable`` has no
second derivative, but ``torch.autograd.grad`` of a gradient by given parameters takes it for zero without a word.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import function


def custom_functions(value: Tensor) -> tuple[list[str], list[str]]:
    """The custom functions that ``value`` was computed by.

    Returns:
        Names of their classes, once each: those with second derivatives of their own making, and those without any.
    """
    found: dict[Any, None] = {}
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        kind = getattr(type(node), '_forward_cls', None)
        if kind is not None:
            found[kind] = None
    once = [kind for kind in found if _is_once_differentiable(kind)]
    return [kind.__name__ for kind in found if kind not in once], [kind.__name__ for kind in once]


def _is_once_differentiable(kind: Any) -> bool:
    """Whether the backward pass is in torch's wrapper for these."""
    code = getattr(kind.backward, '__code__', None)
    return code is not None and code.co_filename == function.once_differentiable.__code__.co_filename
