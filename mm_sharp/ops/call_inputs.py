"""The inputs of a model call, as they were before it.

Every forward pass of a step gets the same batch, whatever an earlier one has done to it. The first one gets what the
caller has passed. The others get shallow copies of lists and dicts, copies of data samples where the model was seen to
change them, and copies of tensors and arrays where it was seen to write to them (:mod:`mm_sharp.ops.rare_changes`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from operator import eq, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mm_sharp.ops.rare_changes import RareChanges, is_ordinary, same_items, versions_of

Leaves = list[tuple[Any, Any]]

_FIELDS = itemgetter('_metainfo_fields', '_data_fields')
_ATOMS = frozenset({type(None), bool, int, float, str, bytes})


class Kept(NamedTuple):
    """Arguments as they were before a call, and what further calls get copies of beside lists and dicts."""

    arguments: Any
    may_write: bool  # the model may write to tensors and arrays, so of these, too
    shared: SharedInputs | None  # what is not copied; None where everything is


class InputSnapshot:
    """Copies of the inputs of a step's first forward pass for the further ones."""

    def __init__(self) -> None:
        self._rare = RareChanges()
        self._arrays: Leaves = []
        self._samples: SampleContents | None = None
        self._samples_change = False

    def take(self, value: Any) -> Kept:
        """Copy arguments, just before the first forward pass."""
        may_write, pairs = self._rare.next_step(), Leaves()
        # Of a model that writes to its inputs everything is copied in any case, of one that changes samples these are.
        known = self._rare.every_step or (self._samples_change and not may_write)
        found = [] if known else [*_samples_in(value)]
        samples = SampleContents(found) if found else None
        # In the first steps the samples are copied, too, so that a model that changes them is known by then.
        if may_write:
            kept = Kept(fresh(value, True, pairs), True, None)
            self._arrays = [pair for pair in pairs if not isinstance(pair[0], Tensor)]
            tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
            self._rare.watch([tensor for tensor, _ in tensors], [copy for _, copy in tensors])
            self._samples = samples
            if samples is not None:
                samples.watch_meta()
            return kept
        if samples is not None and not samples.plain:
            samples = None
        memo = {} if samples is None else samples.by_id()
        arguments = fresh(value, False, pairs, memo)
        watched = [tensor for tensor, _ in pairs if isinstance(tensor, Tensor)]
        return Kept(arguments, False, SharedInputs(watched, samples, self._rare.seen, self._note_samples))

    def check(self) -> None:
        """Find out if the first forward pass has changed the inputs, in a step that has copies to compare with."""
        samples = self._samples
        if not all(map(_same_array, self._arrays)) or (samples is not None and samples.meta_changed()):
            self._rare.seen()
        self._rare.changed()
        if samples is not None and samples.changed():
            self._note_samples()
        self._rare.watch((), None)
        self._arrays, self._samples = [], None

    def _note_samples(self) -> None:
        self._samples_change = True


class SharedInputs:
    """What all passes of a step have in common: tensors, and data samples, unless these are None.

    Both are watched: the functions are called when a pass was seen to have changed tensors, or samples.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        samples: SampleContents | None,
        note_tensors: Callable[[], None],
        note_samples: Callable[[], None],
    ) -> None:
        self._tensors, self._samples = tensors + ([] if samples is None else samples.tensors), samples
        self._versions = versions_of(self._tensors)
        self._note_tensors, self._note_samples = note_tensors, note_samples
        self._in_use = False

    def begin_pass(self) -> dict[int, Any]:
        """What stands for data samples in a further pass, by their ``id``: themselves, or copies as they were."""
        samples = self._samples
        if samples is None:
            return {}
        self._in_use = not samples.changed()
        if self._in_use:
            return samples.by_id()
        self._note_samples()
        return samples.as_they_were()

    def end_pass(self) -> None:
        """Have the samples be as they were before that pass."""
        if versions_of(self._tensors) != self._versions:
            self._note_tensors()
        if self._in_use and self._samples is not None and self._samples.changed():
            self._note_samples()
            self._samples.put_back()
        self._in_use = False


class SampleContents:
    """What data samples hold, and those within them: their attributes, and not what is in lists or tensors.

    ``plain`` is whether no data field has a list, a dict or a tensor that a shared sample cannot have; ``tensors`` are
    those of the data fields.
    """

    def __init__(self, samples: list[BaseDataElement]) -> None:
        self.plain = True
        self.tensors: list[Tensor] = []
        self._samples, found, level = samples, dict[int, BaseDataElement](), samples
        while level:
            new = {id(element): element for element in level if id(element) not in found}
            found |= new
            level = self._within(list(map(vars, new.values())))
        self._elements = list(found.values())
        self._held: list[Any] = [*map(vars, self._elements)]
        self._attributes = [*map(dict.copy, self._held)]
        self._fields = [(of_meta.copy(), of_data.copy()) for of_meta, of_data in map(_FIELDS, self._held)]
        self._meta: list[tuple[Any, Any]] = []

    def _within(self, held: list[dict[str, Any]]) -> list[BaseDataElement]:
        """The elements in the data fields of others, whose attributes are given; all are looked at together."""
        # A name may outlive its value.
        items = [each[name] for each in held for name in each['_data_fields'] if name in each]
        kinds = {*map(type, items)}
        tensors = [item for item in items if type(item) is Tensor] if Tensor in kinds else []
        self.tensors += tensors
        self.plain &= not any(map(_is_changed_in_place, kinds - {Tensor})) and _can_be_shared(tensors)
        nested = {kind for kind in kinds if issubclass(kind, BaseDataElement)}
        return [item for item in items if type(item) in nested] if nested else []

    def by_id(self) -> dict[int, Any]:
        """The samples themselves, without those within them."""
        return {id(sample): sample for sample in self._samples}

    def changed(self) -> bool:
        """Whether an attribute of any was added, removed or replaced by what is not equal."""
        try:
            # Objects that are the same are not asked if they are equal, so this takes a tenth of a loop's time.
            return not all(map(eq, self._held, self._attributes))
        except Exception:  # other tensors and arrays cannot answer in one word
            return True

    def watch_meta(self) -> None:
        """Prepare :meth:`meta_changed`."""
        pairs = zip(self._attributes, self._fields, strict=True)
        values = (was.get(name) for was, (of_meta, _) in pairs for name in of_meta)
        self._meta = [(found, found.copy()) for found in chain.from_iterable(map(_lists_and_dicts, values))]

    def meta_changed(self) -> bool:
        """Whether lists and dicts of the meta information have other items since :meth:`watch_meta`."""
        return not all(same_items(now, was) for now, was in self._meta)

    def as_they_were(self) -> dict[int, Any]:
        """Copies of all with the attributes that they had, by the ``id`` of what they are copies of."""
        twins = {id(element): object.__new__(type(element)) for element in self._elements}
        for twin, was, (of_meta, of_data) in zip(twins.values(), self._attributes, self._fields, strict=True):
            attributes = {name: twins.get(id(item), item) for name, item in was.items()}
            vars(twin).update(attributes, _metainfo_fields=of_meta.copy(), _data_fields=of_data.copy())
        return twins

    def put_back(self) -> None:
        """Give all the attributes that they had."""
        for held, was, (of_meta, of_data) in zip(self._held, self._attributes, self._fields, strict=True):
            held.clear()
            held.update(was)
            for names, before in ((held['_metainfo_fields'], of_meta), (held['_data_fields'], of_data)):
                names.clear()
                names.update(before)


def _is_changed_in_place(kind: type) -> bool:
    """Whether what is in a value of this class may change, and the watch over attributes does not see it."""
    return issubclass(kind, (list, tuple, dict, Tensor))


def _can_be_shared(tensors: list[Tensor]) -> bool:
    """Whether all can be watched, and a backward pass leaves no gradient in any."""
    return all(map(is_ordinary, tensors)) and not any(tensor.requires_grad for tensor in tensors)


def _lists_and_dicts(value: Any) -> Iterator[Any]:
    """The lists and dicts in a value, itself among them."""
    if type(value) in (list, dict):
        yield value
    if type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _lists_and_dicts(item)


def _samples_in(value: Any) -> Iterator[BaseDataElement]:
    """The data samples in lists, tuples and dicts."""
    if isinstance(value, BaseDataElement):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _samples_in(item)
    elif isinstance(value, dict):
        yield from _samples_in(list(value.values()))


def fresh(value: Any, copies: bool, leaves: Leaves | None = None, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a model's arguments with lists, tuples, dicts and data samples of its own.

    With ``copies`` tensors and NumPy arrays are copied as well. ``leaves`` takes those that can be, each with what
    stands for it. ``memo`` has the copies by the originals' ``id``: what is one object stays one. What is in it stands
    for its original.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is Tensor and not copies and not (value.requires_grad and value.is_leaf):
        if leaves is not None and is_ordinary(value):
            leaves.append((value, value))
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (Tensor, np.ndarray)):
        memo[id(value)] = _fresh_leaf(value, copies, leaves)
    elif kind is tuple:
        items = [fresh(item, copies, leaves, memo) for item in value]
        return tuple(items)
    elif isinstance(value, tuple) and hasattr(value, '_make'):
        return kind._make(fresh(item, copies, leaves, memo) for item in value)
    elif isinstance(value, (list, dict)):
        twin = memo[id(value)] = value.copy() if kind is dict else copy.copy(value)
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            twin[key] = fresh(item, copies, leaves, memo)
    elif isinstance(value, BaseDataElement):
        _fresh_element(value, copies, leaves, memo)
    else:
        return value
    return memo[id(value)]


def _fresh_leaf(value: Any, copies: bool, leaves: Leaves | None) -> Any:
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            value = value.detach().requires_grad_()  # its gradient is that of the first pass
        if not is_ordinary(value):
            return value
    twin = _copied(value) if copies else value
    if leaves is not None:
        leaves.append((value, twin))
    return twin


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value.copy()
    if value.is_contiguous() or 0 in value.stride():
        return value.clone()
    # Strided as it is, so that sums are taken in the same order.
    twin = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return twin.copy_(value)


def _fresh_element(element: BaseDataElement, copies: bool, leaves: Leaves | None, memo: dict[int, Any]) -> None:
    twin = memo[id(element)] = object.__new__(type(element))
    attributes = vars(twin)
    attributes.update(vars(element))
    attributes['_metainfo_fields'] = set(element._metainfo_fields)
    attributes['_data_fields'] = set(element._data_fields)
    # A name may outlive its value. Meta information is many small things that hardly anybody changes in place.
    names = element._data_fields | element._metainfo_fields if copies else element._data_fields
    for name in names & attributes.keys():
        attributes[name] = fresh(attributes[name], copies, leaves, memo)


def _same_array(pair: tuple[Any, Any]) -> bool:
    array, was = pair
    kind = array.dtype.kind  # objects may not be comparable
    return kind == 'O' or bool(np.array_equal(array, was, equal_nan=kind in 'fc'))
