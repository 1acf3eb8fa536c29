"""The modules of a model, walked through once and again only where it was rebuilt, and their attributes, read together.

Each step looks twice, and a quantized model has thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from operator import eq, is_, itemgetter
from typing import Any, NamedTuple

from torch import nn

# What every module has besides its own: dicts and sets.
_TORCHS_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


class ModuleTree:
    """All modules and parameters of a model, each once, and whether they still are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        held = [module._parameters for module in self.modules]
        self.parameters = list({id(p): p for each in held for p in each.values() if p is not None}.values())
        self._children: list[Any] = [module._modules for module in self.modules]
        self._children_then = [dict(children) for children in self._children]
        self._parameters: list[Any] = [each for each in held if each]
        self._parameters_then = [parameter for each in self._parameters for parameter in each.values()]

    def same_modules(self) -> bool:
        """Whether every module has the children that it had; fast, for every step asks."""
        return all(map(eq, self._children, self._children_then))

    def unchanged(self) -> bool:
        """The same, and the parameters."""
        now, then = [parameter for each in self._parameters for parameter in each.values()], self._parameters_then
        return self.same_modules() and len(now) == len(then) and all(map(is_, now, then))


def is_compiled(module: nn.Module, method: str = 'forward') -> bool:
    """Whether ``torch.compile`` was applied to a module's call, or to another of its methods."""
    by_hand = '_orig_mod' in module._modules or getattr(module, '_compiled_call_impl', None) is not None
    return hasattr(vars(module).get(method), '_torchdynamo_orig_callable') or (by_hand and method == 'forward')


def own_values(module: nn.Module) -> list[Any]:
    """The values of a module's attributes, torch's own dicts and sets left out."""
    return [value for name, value in vars(module).items() if name not in _TORCHS_OWN]


class Attributes(NamedTuple):
    """What modules have as attributes at some time, torch's own dicts and sets left out."""

    names: list[tuple[str, ...]]  # of each module
    values: list[Any]  # of all modules, one after the other


class ModuleAttributes:
    """Reads and puts back the attributes of ``modules``."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held = [vars(module) for module in modules]
        self._sizes: list[int] = []
        self._names: list[tuple[str, ...]] = []
        self._values_of: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []

    def read(self) -> Attributes:
        """The attributes as they are now."""
        try:
            # A name that has come changes the size, unless one has gone.
            if list(map(len, self._held)) == self._sizes:
                return self._read()
        except KeyError:
            pass
        self._names = [tuple(name for name in held if name not in _TORCHS_OWN) for held in self._held]
        self._values_of = list(map(_values_of, self._names))
        self._sizes = list(map(len, self._held))
        return self._read()

    def _read(self) -> Attributes:
        parts = [values_of(held) for values_of, held in zip(self._values_of, self._held, strict=True)]
        return Attributes(self._names, list(chain.from_iterable(parts)))

    def put_back(self, before: Attributes) -> None:
        """Have the modules' attributes be those that :meth:`read` gave."""
        now = self.read()
        if now.names is before.names and all(map(is_, now.values, before.values)):
            return
        rest = iter(before.values)
        for held, names in zip(self._held, before.names, strict=True):
            values = [next(rest) for _ in _repeated(names)]
            for name in [name for name in held if name not in _TORCHS_OWN and name not in names]:
                del held[name]
            held.update(zip(names, values, strict=False))


@lru_cache(maxsize=4096)
def _values_of(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A fast function that takes the values of these names."""
    return itemgetter(*_repeated(names))


def _repeated(names: Sequence[str]) -> Sequence[str]:
    """The first one is last again: of a single name, itemgetter would give no tuple. There is ``training`` at least."""
    return (*names, names[0])
