"""A wrapper that gives every sample of any map-style data set an id: its index."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import ClassBalancedDataset, RepeatDataset
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from torch.utils.data import Dataset, IterableDataset

from mm_sharp.errors import KindError, UserError
from mm_sharp.samples.keys import SampleKey

_OWN = frozenset({'dataset', 'name'})


@DATASETS.register_module()
class IndexedDataset(Dataset[Any]):
    """A data set whose samples carry a :class:`mm_sharp.samples.keys.SampleKey`, made of ``name`` and their index.

    ::

        train_dataloader = dict(dataset=dict(
            _delete_=True, type='IndexedDataset', dataset=_base_.train_dataloader.dataset))

    The key becomes ``sample_key`` in the meta information of a sample's ``data_samples``; without ``data_samples``, the
    entry ``sample_key`` of a sample that is a dict, or the last element of one that is a tuple or list. The optimizer
    wrappers of this package take it out of the batch before the model sees it.

    Samples that a ``RepeatDataset`` or ``ClassBalancedDataset`` inside repeats keep one id. The data set must stay the
    same, in the same order. A sample that ``BaseDataset`` loads in place of a refused one has that one's id.

    Args:
        dataset: The data set, or its config. Attributes that this class has not are read and set there.
        name: Tells its samples from those of other data sets that it is combined with.

    Raises:
        TypeError: ``dataset`` cannot be indexed, or has no length.
        ValueError: ``name`` is no string, or the index stands for a different sample every time.
    """

    def __init__(self, dataset: Any, name: str = 'dataset') -> None:
        if not isinstance(name, str):
            example = "dict(type='IndexedDataset', name='coco', dataset=...)"
            what = f'IndexedDataset: name={name!r} is not allowed: it must be a string'
            raise UserError(f'{what}. Write for example: {example}')
        built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        if isinstance(built, IterableDataset) or not (hasattr(built, '__getitem__') and hasattr(built, '__len__')):
            needed = '__getitem__(index) and __len__(); a data set that only iterates cannot be given ids'
            what = f'dataset is a {type(built).__name__}, whose samples have no index'
            raise KindError(f'IndexedDataset: {what}. It must have {needed}')
        _check_fixed_order(built)
        self.dataset = built
        self.name = name

    @property
    def metainfo(self) -> dict[str, Any]:
        """The data set's meta information; empty where it has none."""
        return getattr(self.dataset, 'metainfo', {})

    def full_init(self) -> None:
        """Load the annotations, for data sets that put that off."""
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Sample ``index`` of the data set, with its key; a TypeError if it is no dict, tuple or list."""
        place = index = operator.index(index)
        place += len(self) if index < 0 else 0
        for repeating in self.repeating():
            place = repeating._get_ori_dataset_idx(place)
        return _with_key(self.dataset[index], SampleKey.of(self.name, place))

    @property
    def source(self) -> Any:
        """The data set whose indices are the ids: without those around it that repeat its samples."""
        return [self, *self.repeating()][-1].dataset

    def repeating(self) -> Iterator[Any]:
        """The data sets around :attr:`source` that repeat its samples, from the outermost one."""
        dataset = self.dataset
        while isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):
            yield dataset
            dataset = dataset.dataset

    def __getattr__(self, name: str) -> Any:
        # Python's own protocols (pickling, copying, __getitems__) must find what this class has, and only that.
        if name in _OWN or (name.startswith('__') and name.endswith('__')):
            raise AttributeError(f'{type(self).__name__!r} object has no attribute {name!r}')
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks that switch the pipeline during training set it here.
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)


def _with_key(sample: Any, key: SampleKey) -> Any:
    """The sample with its key; a dict, list or tuple is a new one."""
    if isinstance(sample, dict):
        if isinstance(sample.get('data_samples'), BaseDataElement):
            sample['data_samples'].set_metainfo({'sample_key': key})
            return sample
        if not isinstance(sample.get('sample_key', key), SampleKey):
            raise UserError("IndexedDataset: samples have an entry 'sample_key' of their own. Give it another name")
        sample = copy.copy(sample)
        sample['sample_key'] = key
        return sample
    if isinstance(sample, (list, tuple)) and not hasattr(sample, '_fields'):
        # An IndexedDataset within this one has left its own key there.
        own = sample[:-1] if sample and isinstance(sample[-1], SampleKey) else sample
        return [*own, key] if isinstance(sample, list) else (*own, key)
    raise KindError(
        f'IndexedDataset: a sample of the data set is a {type(sample).__name__}, to which no key can be added. Return '
        'from its __getitem__ a dict, such as dict(inputs=image, data_samples=...), or a tuple, such as (image, label)'
    )


def _check_fixed_order(dataset: Any) -> None:
    """Refuse data sets that draw the sample behind an index anew every time, at any depth."""
    if getattr(dataset, 'resample', False) is True:
        raise UserError(
            f'IndexedDataset: dataset is a {type(dataset).__name__} with sample_ratio_factor, which loads another '
            'sample under the same index every time. Wrap each data set in it instead, and pack the key:\n'
            "    dict(type='CombinedDataset', sample_ratio_factor=..., datasets=[\n"
            "        dict(type='IndexedDataset', name='first', dataset=...), ...],\n"
            "        pipeline=[..., dict(type='PackPoseInputs', meta_keys=('sample_key', ...))])"
        )
    for member in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())):
        if member is not None:
            _check_fixed_order(member)
