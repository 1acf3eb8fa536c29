"""Checkpoints that load with ``torch.load(weights_only=True)`` (ours).

Cause: from torch 2.6 on, ``torch.load`` builds only plain types and tensors unless told otherwise, since
anything else can run code. An MMEngine checkpoint holds more: the log's ``HistoryBuffer`` objects (and through
their statistics, functions), numpy arrays and numbers in the data set's description, and dict subclasses.
Allowing these by name is no way out, because the list would have to contain ``getattr``.

So ``to_plain`` rewrites a checkpoint in plain types before it is saved, and ``from_plain`` rebuilds what MMEngine
expects after it was loaded. Whatever is plain already, all weights among it, is passed on as it is.

=====================  ==============================================================  =====================
in the runner          in the file                                                     after loading
=====================  ==============================================================  =====================
``HistoryBuffer``      dict: values, counts, max_length, names of its statistics       ``HistoryBuffer``
numpy array            dict: dtype, shape, bytes as a uint8 tensor                     numpy array
numpy number           Python number                                                   Python number
numpy array of         list                                                            list
objects
``ShardedTensor``      dict: pieces, where they begin, size, number of processes       ``ShardedTensor``
subclass of dict,      the plain type                                                  the plain type
list, tuple, str, …
path                   str                                                             str
=====================  ==============================================================  =====================

Bytes go into a uint8 tensor and not into a tensor of the array's type, because every device can hold uint8
(MPS has no float64, and a checkpoint is mapped to the device as a whole); it is fast for a log of millions of
steps, too.

The data set's description is written twice where it holds arrays: MMPose's inference reads
``meta['dataset_meta']`` as it is in the file, without this module, so there arrays are lists. The exact ones, by which
a resumed run compares its data set, are beside it (:func:`split_dataset_meta`).

Ends with: an mmengine that saves plain checkpoints (none as of 0.10.7).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .plain_shards import is_sharded_tensor, plain_shards, rebuild_shards

# Marks a dict that stands for something else.
TAG = '__mm_sharp__'
_ARRAY, _HISTORY, _SHARDED = 'ndarray', 'HistoryBuffer', 'ShardedTensor'
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.Size, torch.dtype, torch.device),
)  # fmt: skip
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
# Numbers, text, bytes and dates: kinds of numpy types whose bytes are their value. Not 'O', objects.
_BYTE_KINDS = 'biufcSUmM'
# Those of them whose ``tolist`` gives plain types.
_LIST_KINDS = 'biufcSU'
# In ``checkpoint['meta']``: what MMEngine saves and MMPose reads, and what ``from_plain`` rebuilds it from.
_DESCRIPTION, _EXACT = 'dataset_meta', 'mm_sharp_dataset_meta'


def to_plain(value: Any, path: str, left: list[str]) -> Any:
    """``value`` with everything that ``weights_only=True`` refuses rewritten in plain types.

    Args:
        value: anything found in a checkpoint; it is not changed.
        path: where it was found, for messages, e.g. ``"checkpoint['meta']"``.
        left: receives a line for each object that has no plain form; such an object is kept.

    Returns:
        ``value`` itself if nothing in it had to be rewritten.
    """
    if is_sharded_tensor(value):
        return {TAG: _SHARDED, **plain_shards(value)}
    if type(value) in _ATOMS or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, left)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _plain_sequence(value, path, left)
    if type(value) is HistoryBuffer:
        return _plain_history(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in _BYTE_KINDS and value.dtype.names is None:
        return _plain_array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == 'O':
        return to_plain(value.tolist(), path, left)
    return _plain_scalar(value, path, left)


def from_plain(value: Any, path: str) -> Any:
    """The inverse of ``to_plain`` as far as the table in this module says; idempotent.

    Args:
        value: anything found in a loaded checkpoint; it is not changed.
        path: where it was found, for messages.

    Returns:
        ``value`` itself if there was nothing to rebuild, so always for a checkpoint of plain MMEngine.

    Raises:
        ValueError: a marked dict that ``to_plain`` doesn't write.
    """
    if isinstance(value, Mapping):
        if type(value) is dict and TAG in value:
            return _rebuild(value, path)
        items = {key: from_plain(item, f'{path}[{key!r}]') for key, item in value.items()}
        changed = any(items[key] is not item for key, item in value.items())
        if not changed:
            return value
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple):
        parts = [from_plain(item, f'{path}[{i}]') for i, item in enumerate(value)]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value
    return value


def split_dataset_meta(meta: Any) -> Any:
    """A plain ``checkpoint['meta']`` whose ``dataset_meta`` programs without this module understand, too.

    Args:
        meta: What ``to_plain`` made of it; it is not changed.

    Returns:
        ``meta`` itself if its ``dataset_meta`` holds no arrays. Else a copy in which they are lists, with the exact
        ``dataset_meta`` beside them, for :func:`join_dataset_meta`.
    """
    if not isinstance(meta, Mapping) or _DESCRIPTION not in meta:
        return meta
    listed = _with_lists(meta[_DESCRIPTION])
    if listed is meta[_DESCRIPTION]:
        return meta
    return {**meta, _DESCRIPTION: listed, _EXACT: meta[_DESCRIPTION]}


def join_dataset_meta(meta: Any) -> Any:
    """The inverse of :func:`split_dataset_meta`; returns ``meta`` itself if there is nothing to join."""
    if not isinstance(meta, Mapping) or _EXACT not in meta:
        return meta
    joined = {**meta, _DESCRIPTION: meta[_EXACT]}
    del joined[_EXACT]
    return joined


def _with_lists(value: Any) -> Any:
    """``value``, in plain types, with lists for arrays; ``value`` itself if it holds none."""
    if isinstance(value, Mapping):
        if value.get(TAG) == _ARRAY and np.dtype(value['dtype']).kind in _LIST_KINDS:
            return _rebuild_array(dict(value)).tolist()
        items = {key: _with_lists(item) for key, item in value.items()}
        return items if any(items[key] is not item for key, item in value.items()) else value
    if type(value) in (list, tuple):
        parts = [_with_lists(item) for item in value]
        return type(value)(parts) if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


def _plain_mapping(value: Mapping[Any, Any], path: str, left: list[str]) -> Mapping[Any, Any]:
    pairs = [
        (to_plain(key, f'{path} key {key!r}', left), to_plain(item, f'{path}[{key!r}]', left), key, item)
        for key, item in value.items()
    ]
    unchanged = all(key is old_key and item is old for key, item, old_key, old in pairs)
    if unchanged and type(value) in _CONTAINERS:
        return value
    kind = OrderedDict if type(value) is OrderedDict else dict
    return kind((key, item) for key, item, _, _ in pairs)


def _plain_sequence(value: Any, path: str, left: list[str]) -> Any:
    old = list(value)
    parts = [to_plain(item, f'{path}[{i}]', left) for i, item in enumerate(old)]
    if type(value) in _CONTAINERS and all(new is item for new, item in zip(parts, old, strict=True)):
        return value
    kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
    return set(parts) if kind is frozenset else kind(parts)


def _plain_history(value: HistoryBuffer) -> dict[str, Any]:
    values, counts = value.data
    return {
        TAG: _HISTORY,
        'values': _plain_array(values),
        'counts': _plain_array(counts),
        'max_length': int(value.max_length),
        'statistics': sorted(value._statistics_methods),
    }


def _plain_array(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    # A copy: the array may be read-only, which torch warns of, or change before it is written.
    return {
        TAG: _ARRAY,
        'dtype': value.dtype.str,
        'shape': list(value.shape),
        'data': torch.from_numpy(data.copy()),
    }


def _plain_scalar(value: Any, path: str, left: list[str]) -> Any:
    if isinstance(value, np.generic) and type(value.item()) in _ATOMS:
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, str):  # a subclass, such as a member of an Enum of strings
        return str.__str__(value)  # not str(value), which asks the subclass how it wants to look
    kinds: tuple[Any, ...] = (int, float, complex, bytes)
    for kind in kinds:
        if isinstance(value, kind) and not isinstance(value, np.generic):
            return kind(value)
    left.append(f'{path} of type {type(value).__module__}.{type(value).__qualname__}')
    return value


def _rebuild(value: dict[str, Any], path: str) -> Any:
    try:
        if value[TAG] == _ARRAY:
            return _rebuild_array(value)
        if value[TAG] == _HISTORY:
            return _rebuild_history(value)
        if value[TAG] == _SHARDED:
            return rebuild_shards(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{path} is damaged: it stands for a {value[TAG]}, but {error!r}') from error
    raise ValueError(
        f'{path} stands for {value[TAG]!r}, which this version of mm_sharp does not know '
        f'(it knows {_ARRAY!r}, {_HISTORY!r} and {_SHARDED!r}): was it saved by a newer one?'
    )


def _rebuild_array(value: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(value['dtype'])
    if dtype.kind not in _BYTE_KINDS:
        raise ValueError(f'dtype {dtype.str!r} is not one of numbers, text, bytes or dates')
    data: np.ndarray[Any, Any] = value['data'].cpu().numpy()
    return data.view(dtype).reshape(value['shape'])


def _rebuild_history(value: dict[str, Any]) -> HistoryBuffer:
    buffer = HistoryBuffer(max_length=value['max_length'])
    # Not through the constructor, which cuts and converts.
    buffer._log_history = _rebuild_array(value['values'])
    buffer._count_history = _rebuild_array(value['counts'])
    if buffer._log_history.shape != buffer._count_history.shape:
        raise ValueError('it has not as many counts as values')
    return buffer


def missing_statistics(value: Any) -> set[str]:
    """Names of statistics that a plain message hub's logs had and that this process has not registered.

    A function is not stored, only its name: it must be registered by importing the module that defines it
    (``HistoryBuffer.register_statistics``).
    """
    logs = value.get('log_scalars', {}) if isinstance(value, Mapping) else {}
    names: set[str] = set()
    for log in logs.values():
        if isinstance(log, dict) and log.get(TAG) == _HISTORY:
            names.update(log.get('statistics', []))
    HistoryBuffer()  # MMEngine registers its own statistics when the first one is made
    return names - set(HistoryBuffer._statistics_methods)
