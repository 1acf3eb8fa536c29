"""What a forward pass changes in a model besides the gradients, kept and put back.

A training forward updates BatchNorm's running statistics and counters, SyncBN's, observers of quantizers, the queues
and momentum teachers of self-supervised models, and at times a Python number (Brevitas and some losses count their
calls). :mod:`mm_sharp.ops.forward_state` has the order in which a step keeps it and puts it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mm_sharp.ops.module_tree import ModuleTree, is_compiled
from mm_sharp.ops.norm_statistics import BATCH_NORMS
from mm_sharp.ops.rare_changes import is_ordinary
from mm_sharp.ops.tensor_backup import TensorBackup

# What every module has besides its own: dicts and sets.
_TORCHS_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
_PLAIN = frozenset({bool, int, float, str, type(None), tuple, torch.Size, torch.dtype, torch.device})
_CONTAINERS = frozenset({list, dict, set, deque})
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState)
_WRAPPERS = frozenset({'DistributedDataParallel', 'FullyShardedDataParallel'})
_MISSING = object()

Attributes = dict[str, Any]


class StatePlan:
    """Where a model has state: made once, and anew only where the model was rebuilt.

    Args:
        tree: The model.
        trained: ``id`` of the parameters that are trained; by default those that require a gradient.

    Attributes:
        norms: Those of torch's own BatchNorms whose statistics :mod:`mm_sharp.ops.norm_statistics` can look after.
        held: The buffers of all other modules that have some, or may come to have some: those of classes outside torch.
        fixed: The buffers of TorchScript's modules.
        own: Modules of classes outside torch, whose attributes are state.
        frozen: Parameters that are not trained.
    """

    def __init__(self, tree: ModuleTree, trained: Collection[int] | None = None) -> None:
        self.tree = tree
        self.trained = trained
        # Compiled code would be made anew for statistics that are elsewhere in the second pass.
        compiled = any(map(is_compiled, self.tree.modules))
        self.norms = [] if compiled else [module for module in self.tree.modules if type(module) in BATCH_NORMS]
        set_apart = set(map(id, self.norms))
        others = [module for module in self.tree.modules if id(module) not in set_apart]
        self.own = [module for module in others if not _is_left_alone(type(module))]  # type: ignore[arg-type]
        mine = set(map(id, self.own))
        # TorchScript has something else than a dict, which forwards cannot add to.
        self.fixed: list[Any] = [module._buffers for module in others if not isinstance(module._buffers, dict)]
        self.held: list[dict[str, Any]] = [
            module._buffers
            for module in others
            if isinstance(module._buffers, dict) and (module._buffers or id(module) in mine)
        ]
        self.frozen = [
            p for p in self.tree.parameters if not (p.requires_grad if trained is None else id(p) in trained)
        ]


class ModuleStateBackup:
    """Keeps all buffers of a module, and its submodules' attributes.

    Buffers are copied and copied back, so that they keep their storage; one that was replaced by another tensor gets
    its old tensor back, and one that is new is taken away. Attributes are kept for submodules of classes outside torch,
    with what lists, dicts, sets and deques among them hold, and put back where they were replaced, added or deleted; so
    is the state of random generators among them. What happens within other objects is not looked at.

    Attributes:
        rare: What hardly any forward pass changes in place: parameters that are not trained, and tensors among the
            attributes. They are copied if :meth:`save` is told to.
    """

    def __init__(self) -> None:
        self.rare: list[Tensor] = []
        self._backup, self._rare_backup = TensorBackup(), TensorBackup()
        # Buffers as a module has them, and a copy of that dict.
        self._buffers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._odd: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        # A module's attributes, the names of those that are its own, and their values.
        self._attributes: list[tuple[Attributes, _Names, tuple[Any, ...]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []

    def save(self, plan: StatePlan, norms: Iterable[nn.Module] = (), *, rare: bool = False) -> None:
        """Keep the state.

        Args:
            plan: Where it is.
            norms: Those of ``plan.norms`` whose buffers are kept as well.
            rare: Whether :attr:`rare` is copied, too.
        """
        rarely: list[Tensor] = list(plan.frozen)
        self._attributes, self._contents, self._generators = [], [], []
        self._buffers = [(held, dict(held)) for held in plan.held]
        self._buffers += [(norm._buffers, dict(norm._buffers)) for norm in norms]
        for module in plan.own:
            attributes = vars(module)
            names, values = _own_values(type(module), attributes)
            self._attributes.append((attributes, names, values))
            if not _PLAIN.issuperset(map(type, values)):  # by far faster than a look at each
                for value in values:
                    self._look_at(value, rarely)
        self._odd, ordinary = [], []
        for held, then in self._buffers:
            for name, tensor in then.items():
                if tensor is None or is_lazy(tensor):
                    continue
                if is_ordinary(tensor):
                    if _writable(tensor):
                        ordinary.append(tensor)
                elif not tensor.is_meta:
                    self._odd.append((held, name, tensor, tensor.clone()))
        fixed = [tensor for held in plan.fixed for tensor in held.values()]
        self._backup.save([*ordinary, *(tensor for tensor in fixed if is_ordinary(tensor) and _writable(tensor))])
        self.rare = list({id(t): t for t in rarely if not is_lazy(t) and is_ordinary(t) and _writable(t)}.values())
        self._rare_backup.save(self.rare if rare else [])

    def _look_at(self, value: Any, rarely: list[Tensor]) -> None:
        """Keep what is within the value of an attribute; of a tensor it depends."""
        if type(value) in _CONTAINERS:
            self._contents.append((value, value.copy()))
        elif isinstance(value, Tensor):
            if not value.requires_grad:
                rarely.append(value)
        elif isinstance(value, _GENERATORS):
            self._generators.append((value, _generator_state(value)))

    def write_back(self, apart_from: Iterable[Tensor] = ()) -> None:
        """Put everything back, and keep it; does nothing without :meth:`save`.

        Args:
            apart_from: Tensors, such as the weights, whose memory is not written to though a buffer shares it.
        """
        for held, were in self._buffers:
            _put_back_contents(held, were)
        self._backup.write_back(apart_from)
        self._rare_backup.write_back(apart_from)
        for held, name, buffer, copy in self._odd:
            _put_back_odd(held, name, buffer, copy)
        for attributes, names, values in self._attributes:
            if not names.unchanged(attributes, values):
                _put_back_attributes(attributes, names.own, values)
        for value, was in self._contents:
            _put_back_contents(value, was)
        for generator, state in self._generators:
            _set_generator_state(generator, state)

    def write_back_rare(self) -> None:
        """Put :attr:`rare` back alone."""
        self._rare_backup.write_back()

    def restore(self) -> None:
        """Put everything back, and forget it."""
        self.write_back()
        self.drop()

    @property
    def keeps_rare(self) -> bool:
        """Whether :attr:`rare` was copied."""
        return self._rare_backup.saved

    def rare_copies(self) -> list[Tensor]:
        """What was saved of :attr:`rare`."""
        return [copy for _, copy in self._rare_backup.pairs]

    @property
    def buffer_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers that can be written to, each with its copy."""
        return self._backup.pairs

    def drop(self, *, release_rare: bool = False) -> None:
        """Forget what was kept; with ``release_rare`` the memory for :attr:`rare` is given back."""
        self._backup.discard()
        if release_rare:
            self._rare_backup.release()
        else:
            self._rare_backup.discard()
        self._buffers, self._odd, self._attributes, self._contents = [], [], [], []
        self._generators, self.rare = [], []


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
    """Whether a class and all that it derives from are torch's (FSDP2 makes classes of its own from users').

    DDP's and FSDP1's of MMEngine count as torch's: their flags within a model say what happens to the next gradient.
    """
    torchs = all(cls is object or cls.__module__.startswith('torch.') for cls in kind.__mro__)
    return torchs or any(cls.__name__ in _WRAPPERS and cls.__module__.startswith('torch.') for cls in kind.__mro__)


def _writable(buffer: Tensor) -> bool:
    """Whether in-place operations can change ``buffer``: not where its elements share memory (``expand``)."""
    if buffer.is_contiguous():
        return True
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _put_back_attributes(attributes: Attributes, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """Have a module's own attributes be those that were there, with their values."""
    for name, value in zip(names, values, strict=True):
        # Not `!=`: nan differs from itself, and True equals 1.
        if attributes.get(name, _MISSING) is not value:
            attributes[name] = value
    for name in attributes.keys() - _TORCHS_OWN - set(names):
        del attributes[name]


def _put_back_contents(value: Any, was: Any) -> None:
    """Have a list, dict, set or deque hold what it held."""
    mapping = isinstance(value, dict)
    held, before = (value.values(), was.values()) if mapping else (value, was)
    if len(value) == len(was) and all(map(is_, held, before)) and (not mapping or value.keys() == was.keys()):
        return
    value.clear()
    value.extend(was) if isinstance(value, (list, deque)) else value.update(was)


def _put_back_odd(held: dict[str, Any], name: str, buffer: Tensor, copy: Tensor) -> None:
    """Put back what is not ordinary: in place where torch can, otherwise by another tensor."""
    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
        try:
            buffer.copy_(copy)
        except RuntimeError:  # such as a sparse tensor that has another number of elements by now
            held[name] = copy.clone()


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
