"""Checkpoints that load with ``torch.load(weights_only=True)``, which builds only plain types and tensors; and others.

MMEngine's hold more: the log's ``HistoryBuffer`` objects, numpy arrays and numbers, dict subclasses, paths, and under
FSDP ``ShardedTensor`` objects. (To allow these types would be to allow ``getattr``.) ``to_plain`` makes marked dicts of
the arrays, buffers and shards, and plain values of the rest; ``from_plain`` rebuilds what was marked. Bytes are a uint8
tensor, which every device can hold: MPS has no float64, and a checkpoint is mapped to a device as a whole.

Others are loaded on the user's word alone: unpickling can run any code that a file's author chose. ``torch.load``
refuses that by default from torch 2.6 on, but not before, nor in ``torch.hub``, by which MMEngine loads URLs:
:func:`only_weights` overrules both.
"""

from __future__ import annotations

import functools
import operator
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

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
# torch's own switches; it knows the first since 1.13, the second since 2.6, and refuses both at once.
ALWAYS, NEVER = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


def to_plain(value: Any, left: list[str]) -> Any:
    """``value`` with everything that ``weights_only=True`` refuses rewritten; itself if it holds nothing such.

    ``left`` gets the type of each object that has no plain form, and is kept.
    """
    if _is_sharded_tensor(value):
        return _plain_shards(value)
    if type(value) in _ATOMS or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return _each(value, lambda item: to_plain(item, left))
    if type(value) is HistoryBuffer:
        values, counts = map(_plain_array, value.data)
        return {TAG: _HISTORY, 'values': values, 'counts': counts, 'max_length': int(value.max_length)}
    if isinstance(value, np.ndarray) and value.dtype.kind in _BYTE_KINDS and value.dtype.names is None:
        return _plain_array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == 'O':
        return to_plain(value.tolist(), left)
    return _plain_scalar(value, left)


def from_plain(value: Any) -> Any:
    """The inverse of ``to_plain``; a ValueError for a marked dict that it doesn't write."""
    if type(value) is dict and TAG in value:
        return _rebuild(value)
    return _each(value, from_plain) if type(value) in _CONTAINERS else value


def arrays_as_lists(value: Any) -> Any:
    """``value`` with lists for numpy arrays; itself if it is of plain containers and holds none."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return _each(value, arrays_as_lists) if isinstance(value, (Mapping, list, tuple)) else value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container of a plain type with every item changed; ``value`` itself if it is one and no item was changed."""
    is_mapping, plain = isinstance(value, Mapping), type(value) in _CONTAINERS
    old = [part for item in value.items() for part in item] if is_mapping else list(value)
    new = list(map(change, old))
    if plain and all(map(operator.is_, new, old)):
        return value
    if is_mapping:
        kind: Any = type(value) if plain else dict
        return kind(dict(zip(new[::2], new[1::2], strict=True)))
    return next((kind for kind in (list, tuple) if isinstance(value, kind)), set)(new)


def _plain_array(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    # A copy: the array may be read-only, which torch warns of, or change before it is written.
    return {TAG: _ARRAY, 'dtype': value.dtype.str, 'shape': list(value.shape), 'data': torch.from_numpy(data.copy())}


def _plain_scalar(value: Any, left: list[str]) -> Any:
    if isinstance(value, np.generic) and type(value.item()) in _ATOMS:
        return value.item()
    if isinstance(value, (PurePath, str)):  # the latter a subclass, such as a member of an Enum of strings
        return str(value) if isinstance(value, PurePath) else str.__str__(value)  # not as the subclass wants to look
    kinds: tuple[Any, ...] = (int, float, complex, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    left.append(f'{type(value).__module__}.{type(value).__qualname__}')
    return value


def _rebuild(value: dict[str, Any]) -> Any:
    kinds: dict[str, Any] = {_ARRAY: _rebuild_array, _HISTORY: _rebuild_history, _SHARDED: _rebuild_shards}
    if value[TAG] not in kinds:
        raise ValueError(
            f'an entry stands for {value[TAG]!r}, which this version of mm_sharp does not know '
            f'(it knows {sorted(kinds)}): was the checkpoint saved by a newer one?'
        )
    try:
        return kinds[value[TAG]](value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'an entry is damaged: it stands for a {value[TAG]}, but {error!r}') from error


def _rebuild_array(value: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(value['dtype'])
    if dtype.kind not in _BYTE_KINDS:
        raise ValueError(f'dtype {dtype.str!r} is not one of numbers, text, bytes or dates')
    data: np.ndarray[Any, Any] = value['data'].cpu().numpy()
    return data.view(dtype).reshape(value['shape'])


def _rebuild_history(value: dict[str, Any]) -> HistoryBuffer:
    buffer = HistoryBuffer(max_length=value['max_length'])
    # Not through the constructor, which cuts and converts.
    buffer._log_history, buffer._count_history = _rebuild_array(value['values']), _rebuild_array(value['counts'])
    if buffer._log_history.shape != buffer._count_history.shape:
        raise ValueError('it has not as many counts as values')
    return buffer


def _is_sharded_tensor(value: Any) -> bool:
    """Whether ``value`` is a sharded tensor of all processes together (not of a part of them)."""
    if type(value).__name__ != 'ShardedTensor' or not dist.is_initialized():
        return False
    return dist.get_world_size(value._process_group) == dist.get_world_size()


def _plain_shards(value: Any) -> dict[str, Any]:
    """This process's part of a ``ShardedTensor``: the pieces, where they begin, and how many processes there are."""
    # Not by its methods: each of them warns that torch is going to give up sharded tensors.
    shards = value._local_shards
    return {
        TAG: _SHARDED,
        'size': list(value._metadata.size),
        'processes': dist.get_world_size(),
        # A piece shares its memory with the whole flat parameter, all of which would be written.
        'pieces': [shard.tensor.detach().clone() for shard in shards],
        'offsets': [list(shard.metadata.shard_offsets) for shard in shards],
    }


def _rebuild_shards(value: dict[str, Any]) -> Any:
    """The inverse of ``_plain_shards``; all processes must come here."""
    processes = dist.get_world_size() if dist.is_initialized() else 0
    if processes != value['processes']:
        raise ValueError(
            f'it was saved by {value["processes"]} processes under FSDP, each its own part, and is loaded by '
            f"{max(processes, 1)}: start as many, or save whole weights, by strategy=dict(state_dict_cfg='full')"
        )
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard

    pairs = zip(value['pieces'], value['offsets'], strict=True)
    shards = [Shard.from_tensor_and_offsets(piece, offsets, dist.get_rank()) for piece, offsets in pairs]
    return init_from_local_shards(shards, *torch.Size(value['size']))


@contextmanager
def only_weights() -> Iterator[None]:
    """Within, ``torch.load`` builds plain types and tensors only, unless the user's environment says otherwise."""
    if is_set(NEVER):
        yield
        return
    before = os.environ.get(ALWAYS)
    os.environ[ALWAYS] = '1'
    try:
        yield
    finally:
        del os.environ[ALWAYS]
        if before is not None:
            os.environ[ALWAYS] = before


def is_set(switch: str) -> bool:
    """Whether one of torch's switches is set, as torch understands it."""
    return os.environ.get(switch, '0').lower() in ('1', 'y', 'yes', 'true')


def trust_checkpoints() -> ExitStack:
    """From now on, or within ``with``, MMEngine loads checkpoint files of this machine with ``weights_only=False``."""
    original = CheckpointLoader._get_checkpoint_loader('')

    @functools.wraps(original)  # MMEngine logs the loader's name
    def load_from_local(filename: str, map_location: Any = None) -> Any:
        path = os.path.expanduser(filename)
        if not os.path.isfile(path):
            raise FileNotFoundError(f'the checkpoint {filename} can not be found')
        return torch.load(path, map_location=map_location, weights_only=False)

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    trust = ExitStack()
    trust.callback(CheckpointLoader.register_scheme, '', original, force=True)
    return trust


def explain_load_error(error: BaseException) -> str | None:
    """What to tell the user of an error that a checkpoint caused which is not plain; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, pickle.UnpicklingError) and 'weights_only' in str(seen):
            return (
                'the checkpoint holds more than weights and plain values, as those written by MMEngine '
                'without mm_sharp do, or is damaged. If you know who made it, repeat the command with '
                '--trust-checkpoint: loading such a file can run any code that its author put into it. (In a tool '
                f'without this option: {NEVER}=1, at the same risk.)'
            )
        seen = seen.__cause__ or seen.__context__
    return None
