"""A backup of what a training forward changes in a model besides the gradients.

It updates running statistics, observers of quantizers, the queues and momentum teachers of self-supervised models, and
at times a Python number (Brevitas and some losses count their calls).
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache, partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mm_sharp.ops.module_tree import Attributes, ModuleAttributes, ModuleTree, is_compiled, own_values
from mm_sharp.ops.norm_statistics import BATCH_NORMS
from mm_sharp.ops.rare_changes import all_values, is_ordinary, same_items, same_objects
from mm_sharp.ops.stateless import assigns_nothing
from mm_sharp.ops.tensor_backup import TensorBackup

_CONTAINERS = frozenset({list, dict, set, deque, defaultdict, OrderedDict, Counter})
_GENERATORS = (np.random.Generator, np.random.RandomState, torch.Generator, random.Random)
_WRAPPERS = frozenset({'DistributedDataParallel', 'FullyShardedDataParallel'})


class StatePlan:
    """Where a model has state: made once, and anew only where the model was rebuilt.

    ``trained`` are the ``id`` of the parameters that are; by default those that require a gradient. Where a model is
    ``sharded``, all modules are looked at.

    Attributes:
        norms: Those of torch's own BatchNorms whose statistics :mod:`mm_sharp.ops.norm_statistics` can look after.
        held: The buffers of all other modules that have some, or may get some: those of classes outside torch.
        fixed: The buffers of TorchScript's modules, which are held in no dict, and which forwards cannot add to.
        constants: The buffers of modules that only compute: hardly any forward changes them.
        attributes: Those of modules of classes outside torch: they are state, if a forward can change them.
    """

    def __init__(self, tree: ModuleTree, trained: Collection[int] | None = None, *, sharded: bool = False) -> None:
        self.tree = tree
        self.trained = trained
        # Compiled code would be made anew for statistics that are elsewhere in the second pass.
        compiled = any(map(is_compiled, tree.modules))
        self.norms = [] if compiled else [module for module in tree.modules if type(module) in BATCH_NORMS]
        others = [module for module in tree.modules if compiled or type(module) not in BATCH_NORMS]
        computing = set() if sharded else {id(module) for module in others if _only_computes(module)}
        own = [module for module in others if id(module) not in computing and not _is_left_alone(_kind(module))]
        self.attributes, mine = ModuleAttributes(own), set(map(id, own))
        self.fixed: list[Any] = [module._buffers for module in others if not isinstance(module._buffers, dict)]
        buffers = [(module._buffers, id(module)) for module in others if isinstance(module._buffers, dict)]
        self.constants: list[dict[str, Any]] = [held for held, key in buffers if held and key in computing]
        looked_at = [(held, key) for held, key in buffers if key not in computing]
        self.held: list[dict[str, Any]] = [held for held, key in looked_at if held or key in mine]
        self.ordinary, self.rare = _Ordinary(), _Ordinary()
        self.frozen = [p for p in tree.parameters if not (p.requires_grad if trained is None else id(p) in trained)]


class _Ordinary:
    """Finds the tensors that can be written to, apart from sparse ones and other rare kinds; of the same ones once."""

    def __init__(self) -> None:
        self._last: list[Tensor | None] = []
        self._found: list[Tensor] = []

    def among(self, tensors: Iterable[Tensor | None]) -> list[Tensor]:
        """Each of them once."""
        tensors = list(tensors)
        if len(tensors) == len(self._last) and all(map(is_, tensors, self._last)):
            return self._found
        there = [tensor for tensor in tensors if tensor is not None and not is_lazy(tensor)]
        found = list({id(tensor): tensor for tensor in there if is_ordinary(tensor) and _writable(tensor)}.values())
        # What has no values yet may get some, and stay the same object.
        whole = not any(is_lazy(tensor) or tensor.is_meta for tensor in tensors if tensor is not None)
        self._last, self._found = (tensors, found) if whole else ([], [])
        return found


class ModuleStateBackup:
    """A copy of a module's buffers and of its submodules' attributes.

    Buffers keep their storage; one that was replaced gets its old tensor back, and a new one is taken away. Attributes
    are those of submodules of classes outside torch, with the contents of lists, dicts, sets and deques and the states
    of random generators among them. What happens within other objects is not seen.

    Attributes:
        rare: What hardly any forward pass changes in place: parameters that are not trained, constants, and tensors
            among the attributes. They are copied if :meth:`save` is told to.
        backup: The buffers that can be written to, with their copies.
        rare_backup: What is copied of :attr:`rare`.
    """

    def __init__(self) -> None:
        self.rare: list[Tensor] = []
        self.backup, self.rare_backup = TensorBackup(), TensorBackup()
        # Buffers as a module has them, and a copy of that dict; and those of modules that have none so far.
        self._buffers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._without: list[dict[str, Any]] = []
        self._attributes: tuple[ModuleAttributes, Attributes] | None = None
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[Callable[[], None]] = []

    def save(self, plan: StatePlan, norms: Iterable[nn.Module] = (), *, rare: bool = False) -> None:
        """Copy the state where ``plan`` finds it, with the buffers of ``norms``; with ``rare``, :attr:`rare` too."""
        rarely: list[Tensor | None] = [*plan.frozen, *all_values(plan.constants)]
        self._contents, self._generators = [], []
        self._buffers = [(held, dict(held)) for held in plan.held if held]
        self._without = [held for held in plan.held if not held]
        self._buffers += [(norm._buffers, dict(norm._buffers)) for norm in norms]
        attributes = plan.attributes.read()
        self._attributes = plan.attributes, attributes
        kinds = {kind for kind in set(map(type, attributes.values)) if _has_contents(kind)}
        for value in attributes.values if kinds else ():
            if type(value) in kinds:
                self._snapshot_value(value, rarely)
        self.backup.save(plan.ordinary.among(all_values([*(held for held, _ in self._buffers), *plan.fixed])))
        self.rare = plan.rare.among(rarely)
        self.rare_backup.save(self.rare if rare else [])

    def _snapshot_value(self, value: Any, rarely: list[Tensor | None]) -> None:
        """Keep what is within the value of an attribute."""
        if type(value) in _CONTAINERS:
            self._contents.append((value, value.copy()))
        elif isinstance(value, Tensor):
            if not value.requires_grad:
                rarely.append(value)
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._generators.append(partial(setattr, bits, 'state', bits.state))
        elif isinstance(value, random.Random):
            self._generators.append(partial(value.setstate, value.getstate()))
        else:
            self._generators.append(partial(value.set_state, value.get_state()))

    def write_back(self, apart_from: Iterable[Tensor] = ()) -> None:
        """Put everything back, but do not write to memory of ``apart_from``, such as weights that a buffer shares."""
        if self._buffers and not same_objects(*zip(*self._buffers, strict=True)):
            for held, were in self._buffers:
                _restore_contents(held, were)
        if any(self._without):
            for held in self._without:
                held.clear()
        self.backup.write_back(apart_from)
        self.rare_backup.write_back(apart_from)
        if self._attributes is not None:
            attributes, were_values = self._attributes
            attributes.put_back(were_values)
        for value, was in self._contents:
            _restore_contents(value, was)
        for restore in self._generators:
            restore()

    def restore(self) -> None:
        """Put everything back, and forget it."""
        self.write_back()
        self.discard()

    def discard(self, *, release_rare: bool = False) -> None:
        """Forget what was kept; with ``release_rare`` the memory for :attr:`rare` is given back."""
        self.backup.discard()
        self.rare_backup.discard(release=release_rare)
        self._buffers, self._without, self._attributes = [], [], None
        self._contents, self._generators, self.rare = [], [], []


@lru_cache(maxsize=1024)
def _has_contents(kind: type) -> bool:
    """Whether a value of this class can change and stay the same object, in a way that is kept."""
    if issubclass(kind, random.SystemRandom):  # it has no state
        return False
    return kind in _CONTAINERS or issubclass(kind, (Tensor, *_GENERATORS))


@lru_cache(maxsize=1024)
def _is_left_alone(kind: type[nn.Module]) -> bool:
    """Whether a class and all that it derives from are torch's (FSDP2 makes classes of its own from users').

    DDP's and FSDP1's of MMEngine count as torch's: their flags within a model say what happens to the next gradient.
    """
    torchs = [cls.__module__.startswith('torch.') for cls in kind.__mro__[:-1]]
    return all(torchs) or any(own and cls.__name__ in _WRAPPERS for own, cls in zip(torchs, kind.__mro__, strict=False))


def _only_computes(module: nn.Module) -> bool:
    """Whether no forward changes a module's attributes, or what is within them."""
    return assigns_nothing(_kind(module)) and not any(map(_has_contents, set(map(type, own_values(module)))))


def _kind(module: nn.Module) -> Any:
    return type(module)


def _writable(buffer: Tensor) -> bool:
    """Whether in-place operations can change ``buffer``: not where its elements share memory (``expand``)."""
    if buffer.is_contiguous():
        return True
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _restore_contents(value: Any, was: Any) -> None:
    """Have a list, dict, set or deque hold what it held."""
    if same_items(value, was):
        return
    value.clear()
    value.extend(was) if isinstance(value, (list, deque)) else value.update(was)
