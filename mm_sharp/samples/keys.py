"""Which sample of the data set is which row of a mini-batch.

A sample's key, the pair (name of its data set, id), is the same in every epoch and process, and after a resume.
:func:`key_of` reads it from ``sample_key``, which :class:`mm_sharp.samples.indexed_dataset.IndexedDataset` adds, else
from MMPose's and MMDetection's ``id`` of the person or, for pictures with several, ``img_id``, else from MMEngine's
``sample_idx``, the index in the data set.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mm_sharp.errors import UserError
from mm_sharp.ops.model_call import unwrap

Key = tuple[str, int]
_IDS = range(-(2**63), 2**63)  # the history keeps them in 64 bits

_UNIDENTIFIED = """{} has to know every sample again, but found {}: {}. Either
pack what identifies a sample, in the last line of the pipeline:
    dict(type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', ...))
or let the index in the data set be the id, which works with every data set:
    train_dataloader = dict(dataset=dict(_delete_=True, type='IndexedDataset', dataset=_base_.train_dataloader.dataset))
In a training loop of your own, call the model with sample_idx=, a tensor of indices (N,).
"""


class SampleIdError(UserError):
    """A sample cannot be told from the others of its data set; the message shows how to change that."""


class SampleKey(str):
    """A sample's key as a string ``'name:index'``: a number would become a tensor on the device, and cost a wait."""

    __slots__ = ()

    @classmethod
    def of(cls, name: str, index: int) -> SampleKey:
        """The key of sample ``index`` of the data set ``name``."""
        return cls(f'{name}:{index}')

    @property
    def key(self) -> Key:
        """The pair (name, index)."""
        name, _, index = self.rpartition(':')
        return name, int(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleKey:
        # Data samples copy their meta information with every move to a device.
        return self


def key_of(fields: Mapping[str, Any]) -> Key:
    """The key of one sample: the name of its data set, ``''`` where it has none, and the id.

    ``fields`` may have ``sample_key`` (:class:`SampleKey`), or ``dataset_name`` and what :func:`id_field` names, an
    integer. Where nothing identifies the sample, a SampleIdError says only the reason.
    """
    stored = fields.get('sample_key')
    if stored is not None:
        if not isinstance(stored, SampleKey):
            raise SampleIdError(f'sample_key={stored!r} is no SampleKey')
        return stored.key
    name, number = fields.get('dataset_name') or '', fields.get('id')
    if not isinstance(name, str):
        raise SampleIdError(f'dataset_name={name!r} is no string')
    if type(number) is int and number in _IDS:
        return name, number
    field = id_field(fields)
    number = fields.get(field)
    if number is None:
        raise SampleIdError("there is no 'id', 'img_id' or 'sample_idx'")
    if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
        raise SampleIdError(f'{field}={number!r} is no integer')
    if int(number) not in _IDS:
        raise SampleIdError(f'{field}={number!r} has more than 64 bits')
    return name, int(number)


def id_field(fields: Mapping[str, Any]) -> str:
    """Where the id is without a ``sample_key``: ``'id'``, unless it is missing or one for each instance; ``'img_id'``,
    unless it is missing or no number; ``'sample_idx'``.
    """
    number = fields.get('id')
    if number is None or isinstance(number, (list, tuple)) or (isinstance(number, np.ndarray) and number.ndim):
        number = fields.get('img_id')
        return 'sample_idx' if number is None or isinstance(number, str) else 'img_id'
    return 'id'


def unidentified(owner: str, found: str, reason: object) -> SampleIdError:
    """The error that ``owner`` raises where it ``found`` no keys for a ``reason``, with the corrections."""
    return SampleIdError(_UNIDENTIFIED.format(owner, found, reason))


def keys_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, owner: str) -> list[Key]:
    """The keys of the ``size`` samples of a model call ``model(*args, **kwargs)`` that ``owner`` needs.

    Looked for in this order: a list of :class:`SampleKey` among the arguments; ``data_samples``; ``sample_idx`` of a
    batch that is a dict, a list of integers or a tensor (N,), with ``dataset_name``, one or a list of N, where there is
    one. Only reading ``sample_idx`` from a tensor on an accelerator waits for the device.

    Raises:
        SampleIdError: The samples cannot be told apart, or their number is not ``size``.
    """
    found = 'neither data samples nor sample_idx among the arguments of the model'
    try:
        if (stored := _stored_keys(args, kwargs)) is not None:
            found = 'a list of sample keys'
            keys = [key_of({'sample_key': entry}) for entry in stored]
        elif (samples := _data_samples(args, kwargs)) is not None:
            found = f'data samples with the meta keys {sorted(samples[0].metainfo_keys())}'
            keys = [_data_sample_key(sample) for sample in samples]
        else:
            columns = _columns(args, kwargs)
            found = f'a batch with the fields {sorted(map(str, columns))}' if columns else found
            keys = _keys_of_columns(columns)
        if len(keys) != size:
            raise SampleIdError(f'there are {len(keys)} of them for a batch of {size} samples')
    except SampleIdError as error:
        raise unidentified(owner, found, error) from error
    return keys


def without_keys(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of a model call's arguments without the keys of ``IndexedDataset``, but for a ``forward(sample_key)``.

    One that takes any keyword gets those passed by keyword, too.
    """
    parameters = {} if _stored_keys(args, kwargs) is None else inspect.signature(unwrap(model).forward).parameters
    if not parameters or 'sample_key' in parameters:
        return args, dict(kwargs)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kept = {name: _stripped(value) for name, value in kwargs.items() if takes_any or not _is_list_of(SampleKey, value)}
    return tuple(_stripped(value) for value in args if not _is_list_of(SampleKey, value)), kept


def _stored_keys(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The list of sample keys: an argument, a value of a dict, or the last element of a list or tuple; or None."""
    for value in (*args, *kwargs.values()):
        inner = value.values() if isinstance(value, Mapping) else value[-1:] if type(value) in (list, tuple) else ()
        for candidate in (value, *inner):
            if _is_list_of(SampleKey, candidate):
                return candidate
    return None


def _stripped(value: Any) -> Any:
    """A dict, list or tuple without the list of sample keys in it; everything else as it is."""
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if not _is_list_of(SampleKey, item)}
    return value[:-1] if type(value) in (list, tuple) and _is_list_of(SampleKey, *value[-1:]) else value


def _is_list_of(kind: type, value: Any = None) -> bool:
    return type(value) in (list, tuple) and bool(value) and isinstance(value[0], kind)


def _data_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The list of data samples: ``data_samples`` of the call or of a dict in it, then any other list; or None."""
    for value in (kwargs.get('data_samples'), *args, *kwargs.values()):
        candidate = value.get('data_samples') if isinstance(value, Mapping) else value
        if _is_list_of(BaseDataElement, candidate):
            return candidate
    return None


def _data_sample_key(sample: Any) -> Key:
    if not isinstance(sample, BaseDataElement):
        raise SampleIdError(f'one of them is a {type(sample).__name__}')
    fields = vars(sample)  # its own lookups take twice the time
    if fields.get('id') is None and fields.get('sample_key') is None:
        # Of a pose estimator that crops people one picture gives several samples, which 'img_id' would mix up.
        instances = getattr(sample, 'gt_instances', None)
        if instances is not None and 'keypoints' in instances:
            raise SampleIdError("'id' is missing, and people of one picture share all else")
    return key_of(fields)


def _columns(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch as a dict: the keyword arguments, or the first dict that has ``sample_idx``."""
    batches = [value for value in (kwargs, *args, *kwargs.values()) if isinstance(value, Mapping)]
    return next((batch for batch in batches if 'sample_idx' in batch), kwargs)


def _keys_of_columns(columns: Mapping[str, Any]) -> list[Key]:
    numbers, names = columns.get('sample_idx'), columns.get('dataset_name')
    numbers, names = (v.tolist() if isinstance(v, (torch.Tensor, np.ndarray)) else v for v in (numbers, names))
    if not isinstance(numbers, (list, tuple)):
        raise SampleIdError('sample_idx is missing' if numbers is None else 'sample_idx is no list, and no tensor (N,)')
    if not isinstance(names, (list, tuple)):
        names = [names or ''] * len(numbers)
    if len(names) != len(numbers):
        raise SampleIdError(f'there are {len(names)} of dataset_name for {len(numbers)} of sample_idx')
    return [
        # The same, in less time.
        (name, number)
        if type(number) is int and type(name) is str and number in _IDS
        else key_of({'sample_idx': number, 'dataset_name': name})
        for number, name in zip(numbers, names, strict=True)
    ]
