"""What a forward pass changes in a model besides the gradients, kept and put back (ours).

A training forward updates BatchNorm's running statistics and counters, SyncBN's, observers of quantizers, and at times
a Python number (Brevitas and some losses count their calls). The second pass must leave none of that behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mm_sharp.finite import all_finite
from mm_sharp.perturbation import TensorBackup

_PLAIN_NUMBERS = frozenset({bool, int, float})
# Kept as they are instead of being looked at one by one: they hold no memory of note. What is put back are numbers.
_SMALL = _PLAIN_NUMBERS | {str, type(None)}
# What every module has besides: dicts and sets.
_TORCHS_OWN = frozenset(name for name, value in vars(nn.Module()).items() if type(value) not in _SMALL)
_OTHER = object()

Attributes = dict[str, Any]


class ModuleStateBackup:
    """Keeps all buffers of a module, and the plain numbers among its submodules' attributes.

    Buffers are copied and copied back, so that they keep their storage; a buffer that was replaced by another tensor
    gets its old tensor back. Numbers (bool, int, float) are kept for submodules of classes outside torch. Other Python
    state, such as lists, is not looked at.
    """

    def __init__(self) -> None:
        self._backup = TensorBackup()
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        # A module's attributes, the names of those that are its own, and their values, `_OTHER` for what is not kept.
        self._numbers: list[tuple[Attributes, _Names, tuple[Any, ...]]] = []

    def save(self, module: nn.Module) -> None:
        """Keep the state of ``module`` and all its submodules."""
        buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._numbers = []
        # One look at each module: quantized models have thousands, which are not in the processor's cache any more.
        for member in submodules(module):
            attributes = vars(member)
            if attributes['_buffers']:
                named = attributes['_buffers'].items()
                buffers += [(member, name, tensor) for name, tensor in named if tensor is not None]
            if not _is_torchs(type(member)):  # type: ignore[arg-type]  # mypy takes classes to have no hash
                names, values = _own_values(type(member), attributes)
                if not _SMALL.issuperset(map(type, values)):
                    values = tuple(value if type(value) in _SMALL else _OTHER for value in values)
                self._numbers.append((attributes, names, values))
        self._buffers = [entry for entry in buffers if not is_lazy(entry[2])]
        self._backup.save([buffer for *_, buffer in self._buffers if _writable(buffer)])

    def restore(self) -> None:
        """Put everything back; does nothing without :meth:`save`."""
        for member, name, buffer in self._buffers:
            member._buffers[name] = buffer
        self._backup.restore()
        for attributes, names, values in self._numbers:
            if names.unchanged(attributes, values):
                continue
            for name, number in zip(names.own, values, strict=True):
                # Not `!=`: nan differs from itself, and True equals 1.
                if type(number) in _PLAIN_NUMBERS and attributes.get(name) is not number:
                    attributes[name] = number
        self.drop()

    def drop_if_finite(self) -> None:
        """Forget what was kept if the module's buffers are finite now; otherwise put everything back."""
        if all_finite([buffer for *_, buffer in self._buffers if buffer.is_floating_point()]):
            self.drop()
        else:
            self.restore()

    def drop(self) -> None:
        """Forget what was kept."""
        self._backup.drop()
        self._buffers, self._numbers = [], []


def submodules(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and all below it, each once: ``module.modules()`` in another order, and faster."""
    found, seen = [module], {id(module)}
    for member in found:  # which grows
        yield member
        below = vars(member)['_modules']
        for child in below.values() if below else ():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)


class _Names:
    """Names of the attributes that a class's instances have of their own, where they have ``count`` in all."""

    def __init__(self, attributes: Attributes) -> None:
        self.count = len(attributes)
        own = [name for name in attributes if name not in _TORCHS_OWN]
        # Of a single name, itemgetter would give no tuple.
        self.own = (*own, own[0]) if len(own) == 1 else tuple(own)
        self.values: Callable[[Attributes], tuple[Any, ...]] = itemgetter(*self.own) if own else lambda _: ()

    def unchanged(self, attributes: Attributes, values: tuple[Any, ...]) -> bool:
        """Whether the values are these very ones."""
        try:
            return all(map(is_, self.values(attributes), values))
        except KeyError:  # one has been deleted
            return False


_names: dict[type, _Names] = {}


def _own_values(kind: type, attributes: Attributes) -> tuple[_Names, tuple[Any, ...]]:
    """The attributes of a class's instance that are not torch's.

    Instances have mostly the same names, so that looking at each one's is spared: these are all, if they are there and
    the number of attributes is right.
    """
    names = _names.get(kind)
    if names is not None and names.count == len(attributes):
        try:
            return names, names.values(attributes)
        except KeyError:
            pass
    names = _names[kind] = _Names(attributes)
    return names, names.values(attributes)


@lru_cache(maxsize=1024)  # asked of every module, twice a step
def _is_torchs(kind: type) -> bool:
    """Whether a class and all that it derives from are torch's: FSDP2 makes classes of its own from users'."""
    return all(cls is object or cls.__module__.startswith('torch.') for cls in kind.__mro__)


def _writable(buffer: Tensor) -> bool:
    """Whether in-place operations can change ``buffer``: not where its elements share memory (``expand``)."""
    if buffer.is_contiguous():
        return True
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
