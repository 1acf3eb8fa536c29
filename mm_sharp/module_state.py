"""What a forward pass changes in a model besides the gradients, kept and put back (ours).

A training forward updates BatchNorm's running statistics and counters, SyncBN's, observers of quantizers, the queues
and momentum teachers of self-supervised models, and at times a Python number (Brevitas and some losses count their
calls). :mod:`mm_sharp.forward_state` has the order in which a step keeps it and puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from mm_sharp.perturbation import TensorBackup

# Kept as they are, by reference: they hold no memory of note, or are the model's own anyway.
_KEPT = frozenset({bool, int, float, str, type(None), Tensor})
# What every module has besides: dicts and sets.
_TORCHS_OWN = frozenset(name for name, value in vars(nn.Module()).items() if type(value) not in _KEPT)
_OTHER = object()

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

Attributes = dict[str, Any]


class ModuleStateBackup:
    """Keeps all buffers of a module, and the numbers, strings and tensors among its submodules' attributes.

    Buffers are copied and copied back, so that they keep their storage; a buffer that was replaced by another tensor
    gets its old tensor back. Attributes are kept for submodules of classes outside torch, and put back where they were
    replaced or deleted; those that are new are deleted. Other Python state, such as lists, is not looked at.

    Attributes:
        rare: What hardly any forward pass changes in place: frozen parameters, and tensors among the attributes. They
            are copied if :meth:`save` is told to.
    """

    def __init__(self) -> None:
        self.rare: list[Tensor] = []
        self._backup = TensorBackup()
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._odd: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        # A module's attributes, the names of those that are its own, and their values, `_OTHER` for what is not kept.
        self._attributes: list[tuple[Attributes, _Names, tuple[Any, ...]]] = []

    def save(self, module: nn.Module, *, rare: bool = False) -> None:
        """Keep the state of ``module`` and all its submodules.

        Args:
            module: The module.
            rare: Whether :attr:`rare` is copied, too.
        """
        buffers: list[tuple[nn.Module, str, Tensor]] = []
        rarely: list[Tensor] = []
        self._attributes = []
        # One look at each module: quantized models have thousands, which are not in the processor's cache any more.
        for member in submodules(module):
            attributes = vars(member)
            if attributes['_buffers']:
                named = attributes['_buffers'].items()
                buffers += [(member, name, tensor) for name, tensor in named if tensor is not None]
            if parameters := attributes['_parameters']:
                rarely += [tensor for tensor in parameters.values() if tensor is not None and not tensor.requires_grad]
            if not _is_left_alone(type(member)):  # type: ignore[arg-type]  # mypy takes classes to have no hash
                names, values = _own_values(type(member), attributes)
                if not _KEPT.issuperset(map(type, values)):
                    values = tuple(value if type(value) in _KEPT else _OTHER for value in values)
                rarely += [value for value in values if type(value) is Tensor and not value.requires_grad]
                self._attributes.append((attributes, names, values))
        self._buffers = [entry for entry in buffers if not is_lazy(entry[2])]
        self._odd = [(*entry, entry[2].clone()) for entry in self._buffers if not _is_plain(entry[2])]
        self.rare = list({id(t): t for t in rarely if not is_lazy(t) and _is_plain(t) and _writable(t)}.values())
        kept = [buffer for *_, buffer in self._buffers if _is_plain(buffer) and _writable(buffer)]
        self._backup.save([*kept, *self.rare] if rare else kept)

    def write_back(self, apart_from: Iterable[Tensor] = ()) -> None:
        """Put everything back, and keep it; does nothing without :meth:`save`.

        Args:
            apart_from: Tensors, such as the weights, whose memory is not written to though a buffer shares it.
        """
        for member, name, buffer in self._buffers:
            member._buffers[name] = buffer
        self._backup.write_back(apart_from)
        for member, name, buffer, copy in self._odd:
            _put_back_odd(member, name, buffer, copy)
        for attributes, names, values in self._attributes:
            if not names.unchanged(attributes, values):
                _put_back_attributes(attributes, names.own, values)

    def restore(self) -> None:
        """Put everything back, and forget it."""
        self.write_back()
        self.drop()

    def copies(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What was saved of ``tensors``."""
        copies = self._backup.copies
        return [copies[tensor] for tensor in tensors]

    def float_buffers(self) -> list[Tensor]:
        """The buffers that were copied in which a number may become infinite or nan; none of them is empty."""
        copied = self._backup.tensors
        return [tensor for tensor in copied if tensor.dtype in _FLOATS and tensor.numel() and not tensor.is_meta]

    def drop(self) -> None:
        """Forget what was kept."""
        self._backup.drop()
        self._buffers, self._odd, self._attributes, self.rare = [], [], [], []


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
        """Whether the attributes are these, with these very values."""
        try:
            return self.count == len(attributes) and all(map(is_, self.values(attributes), values))
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
def _is_left_alone(kind: type) -> bool:
    """Whether a class and all that it derives from are torch's (FSDP2 makes classes of its own from users'), or DDP's.

    The flags of DDP within a model say what happens to the next gradient, and are not the model's.
    """
    torchs = all(cls is object or cls.__module__.startswith('torch.') for cls in kind.__mro__)
    return torchs or issubclass(kind, DistributedDataParallel)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied together with others: not sparse, nested, of MKLDNN or of inference mode."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_inference()


def _writable(buffer: Tensor) -> bool:
    """Whether in-place operations can change ``buffer``: not where its elements share memory (``expand``)."""
    if buffer.is_contiguous():
        return True
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _put_back_attributes(attributes: Attributes, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """Have the attributes that are kept be those that were there, with their values."""
    for name, value in zip(names, values, strict=True):
        # Not `!=`: nan differs from itself, and True equals 1.
        if value is not _OTHER and attributes.get(name, _OTHER) is not value:
            attributes[name] = value
    for name in attributes.keys() - _TORCHS_OWN - set(names):
        if type(attributes[name]) in _KEPT:
            del attributes[name]


def _put_back_odd(member: nn.Module, name: str, buffer: Tensor, copy: Tensor) -> None:
    """Put back what is not plain: in place where torch can, otherwise by another tensor."""
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        try:
            buffer.copy_(copy)
        except RuntimeError:  # such as a sparse tensor that has another number of elements by now
            member._buffers[name] = copy.clone()
