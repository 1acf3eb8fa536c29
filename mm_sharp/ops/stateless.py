"""Which modules' attributes no forward can change, as their classes' code says.

A quantized model has thousands of modules, most of which only compute. Reading all their attributes before and after
every pass is most of what a step adds to it.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

# Whose classes are looked into: they are written so that TorchScript can compile them, which knows no other ways.
_LIBRARY = 'brevitas.'
_ASSIGN = frozenset({'STORE_ATTR', 'DELETE_ATTR'})
_BY_NAME = frozenset({'setattr', 'delattr', '__setattr__', '__dict__', 'vars', 'register_buffer', 'register_parameter'})


@lru_cache(maxsize=1024)
def assigns_nothing(kind: type[nn.Module]) -> bool:
    """Whether a class and all that it derives from are Brevitas's, and only ``__init__`` assigns to attributes."""
    own = [cls for cls in kind.__mro__ if cls not in (nn.Module, object)]
    return bool(own) and all(cls.__module__.startswith(_LIBRARY) and not _assigns(cls) for cls in own)


def _assigns(cls: type) -> bool:
    for name, value in vars(cls).items():
        if name == '__init__' or isinstance(value, type) or not _is_code(value):
            continue
        for function in _functions(value):
            code = getattr(inspect.unwrap(function), '__code__', None)
            if code is None or any(map(_code_assigns, _with_nested(code))):
                return True
    return False


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


def _functions(value: Any) -> list[Any]:
    if isinstance(value, property):
        return [function for function in (value.fget, value.fset, value.fdel) if function is not None]
    return [value.__func__ if isinstance(value, (staticmethod, classmethod)) else value]


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _code_assigns(code: CodeType) -> bool:
    return bool(_BY_NAME & set(code.co_names)) or any(step.opname in _ASSIGN for step in dis.get_instructions(code))
