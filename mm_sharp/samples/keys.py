"""Which sample of the data set is which row of a mini-batch (ours).

A sample's key is the pair (name of its data set, id): what an average loss difference is kept under. It is the same in
every epoch and every process, and after a resume. :func:`key_of` is the one rule by which a key is read from what is
known of a sample; :func:`keys_of` applies it to a batch on its way into the model.

Three sources, in this order:

- ``sample_key``: a :class:`SampleKey`, which :class:`mm_sharp.samples.indexed_dataset.IndexedDataset` adds to samples;
- MMPose's and MMDetection's ids: ``id`` of the person or, where a sample is a picture with several, ``img_id``;
- MMEngine's ``sample_idx``, the index in the data set.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mm_sharp.errors import UserError
from mm_sharp.ops.model_call import unwrap

Key = tuple[str, int]

_INT64 = np.iinfo(np.int64)
_CORRECTIONS = """Either pack what identifies a sample, in the last line of the pipeline:
    dict(type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', ...))
or let the index in the data set be the id, which works with every data set:
    train_dataloader = dict(dataset=dict(_delete_=True, type='IndexedDataset', dataset=_base_.train_dataloader.dataset))
"""


class SampleIdError(UserError):
    """A sample cannot be told from the others of its data set; the message shows how to change that."""


class SampleKey(str):
    """A sample's key as a string ``'name:index'``.

    A string, because collating, pinning memory and moving to a device leave strings alone, where a number would become
    a tensor on the device, which costs a synchronisation to read.
    """

    __slots__ = ()

    @classmethod
    def of(cls, name: str, index: int) -> SampleKey:
        """The key of sample ``index`` of the data set ``name``."""
        return cls(f'{name}:{index}')

    @property
    def key(self) -> Key:
        """The pair (name, index).

        Raises:
            SampleIdError: The string has another form.
        """
        name, colon, index = self.rpartition(':')
        try:
            if colon:
                return name, int(index)
        except ValueError:
            pass
        raise SampleIdError(f"sample_key={str(self)!r} is not allowed: write SampleKey.of('name', 7)")

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleKey:
        # Data samples copy their meta information with every move to a device.
        return self


class Fields(Protocol):
    """What is known of a sample: a data sample's meta information, or a dict."""

    def get(self, key: str, /) -> Any: ...


def key_of(fields: Fields) -> Key:
    """The key of one sample.

    Args:
        fields: May have ``sample_key`` (:class:`SampleKey`), or ``id``, ``img_id``, ``sample_idx`` (integers) and
            ``dataset_name``. ``img_id`` counts where there is no ``id``, or one for each instance of the picture;
            ``sample_idx`` where ``img_id`` is missing, too, or is no number.

    Returns:
        The name of the data set, ``''`` where it has none, and the id.

    Raises:
        SampleIdError: Nothing there identifies the sample. The message is only the reason.
    """
    stored = fields.get('sample_key')
    if stored is not None:
        if not isinstance(stored, SampleKey):
            raise SampleIdError(f'sample_key={stored!r} is no SampleKey')
        return stored.key
    name = fields.get('dataset_name') or ''
    if not isinstance(name, str):
        raise SampleIdError(f'dataset_name={name!r} is no string')
    field = id_field(fields)
    return name, _integer(field, fields.get(field))


def id_field(fields: Fields) -> str:
    """Where :func:`key_of` finds the id if there is no ``sample_key``: ``'id'``, ``'img_id'`` or ``'sample_idx'``."""
    number = fields.get('id')
    if number is None or isinstance(number, (list, tuple)) or (isinstance(number, np.ndarray) and number.ndim):
        number = fields.get('img_id')
        return 'sample_idx' if number is None or isinstance(number, str) else 'img_id'
    return 'id'


def unidentified(owner: str, found: str, reason: object) -> SampleIdError:
    """The error with both corrections.

    Args:
        owner: Who needs the keys.
        found: What it found instead.
        reason: What is wrong with that.
    """
    return SampleIdError(
        f'{owner} keeps a score for every sample and needs to know each again, but found {found}: {reason}. '
        + _CORRECTIONS
    )


def keys_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, owner: str) -> list[Key]:
    """The keys of the samples of a model call ``model(*args, **kwargs)``.

    Looked for in this order: a list of :class:`SampleKey` among the arguments; ``data_samples``, whose meta information
    :func:`key_of` reads; ``sample_idx`` of a batch that is a dict, a list of integers or a tensor (N,), with
    ``dataset_name``, one or a list of N, where there is one. Reading ``sample_idx`` from a tensor on an accelerator
    waits for the device; none of the other ways does.

    Args:
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
        size: N, the batch's samples.
        owner: Who needs the keys, for the message.

    Returns:
        N pairs of a data set's name and an id.

    Raises:
        SampleIdError: The samples cannot be told apart, or their number is not ``size``.
    """
    found = 'neither data samples nor sample_idx among the arguments of the model'
    try:
        if (stored := _sample_keys(args, kwargs)) is not None:
            found = 'a list of sample keys'
            keys = [key_of({'sample_key': entry}) for entry in stored]
        elif (samples := _data_samples(args, kwargs)) is not None:
            found = f'data samples with the meta keys {sorted(samples[0].metainfo_keys())}'
            keys = [_data_sample_key(sample) for sample in samples]
        else:
            columns = _columns(args, kwargs)
            found = f'a batch with the fields {sorted(map(str, columns))}' if columns else found
            keys = _keys_of_columns(columns, size)
        if len(keys) != size:
            raise SampleIdError(f'there are {len(keys)} of them for a batch of {size} samples')
    except SampleIdError as error:
        raise unidentified(owner, found, error) from error
    return keys


def without_keys(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model call without the sample keys that ``IndexedDataset`` added; nothing else is removed.

    Args:
        model: The model that is called, or DDP and the like around it. One whose ``forward`` has a parameter
            ``sample_key`` gets the keys; one that takes any keyword gets those passed by keyword.
        args: Positional arguments; not changed.
        kwargs: Keyword arguments; not changed.
    """
    if _sample_keys(args, kwargs) is None:
        return args, dict(kwargs)
    parameters = inspect.signature(unwrap(model).forward).parameters
    if 'sample_key' in parameters:
        return args, dict(kwargs)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kept = {name: _stripped(value) for name, value in kwargs.items() if takes_any or not _is_keys(value)}
    return tuple(_stripped(value) for value in args if not _is_keys(value)), kept


def _sample_keys(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | tuple[Any, ...] | None:
    """The list of sample keys: an argument, or an element of a dict, list or tuple that is one."""
    for value in (*args, *kwargs.values()):
        inner = value.values() if isinstance(value, Mapping) else value[-1:] if _is_plain(value) else ()
        for candidate in (value, *inner):
            if _is_keys(candidate):
                return candidate  # type: ignore[no-any-return]
    return None


def _stripped(value: Any) -> Any:
    """A dict, list or tuple without the list of sample keys in it; everything else as it is."""
    if isinstance(value, dict) and any(map(_is_keys, value.values())):
        return {name: item for name, item in value.items() if not _is_keys(item)}
    return value[:-1] if _is_plain(value) and value and _is_keys(value[-1]) else value


def _is_keys(value: Any) -> bool:
    return _is_plain(value) and bool(value) and isinstance(value[0], SampleKey)


def _is_plain(value: Any) -> bool:
    return type(value) in (list, tuple)


def _data_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | tuple[Any, ...] | None:
    """The list of data samples: ``data_samples`` first, of the call or of a dict in it, then any positional list."""
    for value in (kwargs.get('data_samples'), *args, *kwargs.values()):
        candidate = value.get('data_samples') if isinstance(value, Mapping) else value
        if _is_plain(candidate) and candidate and isinstance(candidate[0], BaseDataElement):
            return candidate  # type: ignore[no-any-return]
    return None


def _data_sample_key(sample: Any) -> Key:
    if not isinstance(sample, BaseDataElement):
        raise SampleIdError(f'one of them is a {type(sample).__name__}')
    if getattr(sample, 'id', None) is None and getattr(sample, 'sample_key', None) is None:
        # Of a pose estimator that crops people one picture gives several samples, which 'img_id' would mix up.
        instances = getattr(sample, 'gt_instances', None)
        if instances is not None and 'keypoints' in instances:
            raise SampleIdError("'id' is missing, and people of one picture share all else")
    return key_of(sample)


def _columns(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch as a dict: the keyword arguments, or the first dict that has ``sample_idx``."""
    dicts: Iterator[Mapping[str, Any]] = (value for value in (*args, *kwargs.values()) if isinstance(value, Mapping))
    return next((batch for batch in (kwargs, *dicts) if 'sample_idx' in batch), kwargs)


def _keys_of_columns(columns: Mapping[str, Any], size: int) -> list[Key]:
    numbers, names = columns.get('sample_idx'), columns.get('dataset_name')
    if isinstance(numbers, (torch.Tensor, np.ndarray)) and numbers.ndim == 1:
        numbers = numbers.tolist()
    if not isinstance(numbers, (list, tuple)):
        what = 'is missing' if numbers is None else f'is no list of {size} integers, and no tensor of shape ({size},)'
        raise SampleIdError(f'sample_idx {what}')
    if not isinstance(names, (list, tuple)):
        names = [names] * len(numbers)
    if len(names) != len(numbers):
        raise SampleIdError(f'there are {len(numbers)} sample_idx and {len(names)} dataset_name')
    return [key_of({'sample_idx': n, 'dataset_name': name}) for n, name in zip(numbers, names, strict=True)]


def _integer(field: str, number: Any) -> int:
    """``number`` as a plain int."""
    if type(number) is not int:
        if number is None:
            raise SampleIdError("there is no 'id', 'img_id' or 'sample_idx'")
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
            raise SampleIdError(f'{field}={number!r} is no integer')
        number = int(number)
    if not _INT64.min <= number <= _INT64.max:
        raise SampleIdError(f'{field}={number} is not in the range of 64-bit integers')
    return number  # type: ignore[no-any-return]
