"""IndexedDataset: any map-style data set's samples get an id, and nothing else about it changes."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dataset import BaseDataset, Compose, RepeatDataset, default_collate, pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import BaseDataElement
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import SampleIdError, SampleKey, keys_of
from tests.tiny_data import draw_coco

SIZE = 10


@DATASETS.register_module()
class Numbers(BaseDataset):
    """A data set of MMEngine's: the samples are the annotations."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [{'inputs': torch.tensor([float(i)])} for i in range(SIZE)]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [idx % 2 if idx else 7]


class Made(Dataset[Any]):
    """Samples that a function makes of their index."""

    def __init__(self, make: Any, size: int = SIZE) -> None:
        self.make, self.size, self.pipeline = make, size, 'first'

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


Pair = namedtuple('Pair', ['image', 'label'])


def as_dict(index: int) -> Any:
    return {'inputs': torch.tensor([float(index)])}


def as_tuple(index: int) -> Any:
    return torch.tensor([float(index)]), index % 3


def as_data_sample(index: int) -> Any:
    return {'inputs': torch.tensor([float(index)]), 'data_samples': BaseDataElement(metainfo={'id': 0})}


def batch_of(data: Any, shuffle: bool = False, **kwargs: Any) -> Iterator[tuple[list[int], list[tuple[str, int]]]]:
    """Which samples each batch holds by their content, and what its keys say."""
    generator = torch.Generator().manual_seed(1)
    for batch in DataLoader(data, batch_size=4, shuffle=shuffle, generator=generator, **kwargs):
        args, kwargs_ = ((), batch) if isinstance(batch, dict) else (tuple(batch), {})
        inputs = [int(value) for value in (batch['inputs'] if isinstance(batch, dict) else batch[0])]
        yield inputs, keys_of(args, kwargs_, len(inputs), 'test')


@pytest.mark.parametrize(
    ('make', 'collate', 'workers'),
    [
        (as_dict, None, 0),
        (as_dict, default_collate, 0),
        (as_dict, pseudo_collate, 2),
        (as_tuple, None, 2),
        (as_tuple, default_collate, 0),
        (as_tuple, pseudo_collate, 0),
        # torch's own collating knows no data samples.
        (as_data_sample, default_collate, 2),
        (as_data_sample, pseudo_collate, 0),
    ],
)
def test_batches_carry_the_keys(make: Any, collate: Any, workers: int) -> None:
    data = IndexedDataset(Made(make), name='mine')
    seen = []
    for inputs, keys in batch_of(data, True, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0):
        assert keys == [('mine', value) for value in inputs]
        seen += inputs
    assert sorted(seen) == list(range(SIZE))
    assert seen != sorted(seen)


def test_persistent_workers_give_the_same_keys_every_epoch() -> None:
    loader = DataLoader(
        IndexedDataset(Made(as_dict)), batch_size=4, num_workers=2, persistent_workers=True, collate_fn=pseudo_collate
    )
    first, second = ([key.key for batch in loader for key in batch['sample_key']] for _ in range(2))
    assert first == second == [('dataset', i) for i in range(SIZE)]


@pytest.mark.parametrize(('make', 'place'), [(as_tuple, 2), (lambda i: [i, i], 2), (lambda i: (), 0)])
def test_the_last_element_of_a_tuple_or_list(make: Any, place: int) -> None:
    sample = IndexedDataset(Made(make))[3]
    assert type(sample) is type(make(3))
    assert len(sample) == place + 1
    assert sample[place] == SampleKey.of('dataset', 3)


def test_what_the_data_set_keeps_is_not_changed() -> None:
    rows = [{'x': 0}, {'x': 1}]
    data = IndexedDataset(rows)
    assert data[1] == {'x': 1, 'sample_key': 'dataset:1'}
    assert rows == [{'x': 0}, {'x': 1}]


def test_indices_of_other_types_and_from_the_end() -> None:
    data = IndexedDataset(Numbers())
    for index in (torch.tensor(9), -1):
        sample = data[index]
        assert sample['inputs'].item() == 9
        assert sample['sample_key'].key == ('dataset', 9)
    with pytest.raises(TypeError, match='integer'):
        data[1.0]


# ---------------------------------------------------------------- it is the data set otherwise
def test_attributes_are_the_data_set_s() -> None:
    inner = Numbers(metainfo={'classes': ['a']}, lazy_init=True)
    data = IndexedDataset(inner)
    assert not data._fully_initialized
    data.full_init()
    assert inner._fully_initialized
    assert len(data) == SIZE
    assert data.metainfo == {'classes': ['a']}
    assert data.get_data_info(2)['sample_idx'] == 2
    assert data.get_cat_ids(3) == [1]
    with pytest.raises(AttributeError, match='nothing'):
        _ = data.nothing
    # Hooks that change the pipeline in the middle of a run do it this way.
    data.pipeline = Compose([lambda info: {'inputs': -info['inputs']}])
    assert data[2]['inputs'].item() == -2


def test_a_data_set_of_torch_needs_none_of_mmengine_s_attributes() -> None:
    inner = Subset(TensorDataset(torch.arange(3), torch.arange(3)), [2, 0])
    data = IndexedDataset(inner)
    data.full_init()
    assert data.metainfo == {}
    assert not hasattr(data, 'get_data_info')
    assert data[1][2].key == ('dataset', 1)
    # By this method torch would load past the wrapper.
    assert hasattr(inner, '__getitems__')
    ((_, _, keys),) = DataLoader(data, batch_size=2)
    assert [key.key for key in keys] == [('dataset', 0), ('dataset', 1)]


@pytest.mark.parametrize('carry', [copy.copy, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_it_can_be_copied_and_pickled(carry: Any) -> None:
    carried = carry(IndexedDataset(Numbers(), name='n'))
    assert type(carried) is IndexedDataset
    assert carried[4]['sample_key'].key == ('n', 4)
    assert len(carried) == SIZE


# ---------------------------------------------------------------- wrappers
def config(name: str = 'dataset') -> dict[str, Any]:
    return {'type': 'IndexedDataset', 'name': name, 'dataset': {'type': 'Numbers'}}


def keys(data: Any) -> list[tuple[str, int]]:
    return [data[i]['sample_key'].key for i in range(len(data))]


def test_inside_wrappers() -> None:
    own = list(range(SIZE))
    joined = DATASETS.build({'type': 'ConcatDataset', 'datasets': [config('a'), config('b')]})
    assert keys(joined) == [('a', i) for i in own] + [('b', i) for i in own]
    repeated = DATASETS.build({'type': 'RepeatDataset', 'times': 2, 'dataset': config('a')})
    assert keys(repeated) == [('a', i) for i in own] * 2
    assert keys(ConcatDataset([IndexedDataset(Numbers(), 'a'), IndexedDataset(Numbers(), 'b')])) == keys(joined)


def test_around_wrappers() -> None:
    joined = {'type': 'ConcatDataset', 'datasets': [{'type': 'Numbers'}] * 2}
    data = DATASETS.build({'type': 'IndexedDataset', 'dataset': joined})
    assert keys(data) == [('dataset', i) for i in range(2 * SIZE)]
    # A sample that is repeated is the same sample.
    repeated = IndexedDataset(RepeatDataset(Numbers(), 3))
    assert keys(repeated) == [('dataset', i) for i in range(SIZE)] * 3
    balanced = {'type': 'ClassBalancedDataset', 'oversample_thr': 0.5, 'dataset': {'type': 'Numbers'}}
    data = DATASETS.build({'type': 'IndexedDataset', 'dataset': balanced})
    assert len(data) > SIZE
    assert [key for _, key in keys(data)] == [int(data[i]['inputs']) for i in range(len(data))]


@pytest.mark.parametrize('make', [as_dict, as_tuple, as_data_sample])
def test_the_outer_one_counts(make: Any) -> None:
    data = IndexedDataset(ConcatDataset([IndexedDataset(Made(make), 'in'), IndexedDataset(Made(make), 'in')]), 'out')
    (_, found), *_ = batch_of(data, sampler=[17, 2, 3, 1], collate_fn=pseudo_collate)
    assert found == [('out', 17), ('out', 2), ('out', 3), ('out', 1)]


def test_mmpose_s_data_set_in_its_scope(tmp_path: Path) -> None:
    pytest.importorskip('mmpose.datasets')
    draw_coco(tmp_path / 'coco', train=5)
    inner = {
        'type': 'CocoDataset',
        'data_root': str(tmp_path / 'coco'),
        'ann_file': 'annotations/person_keypoints_train.json',
        'data_prefix': {'img': 'train/'},
        'pipeline': [
            {'type': 'LoadImage'},
            {'type': 'GetBBoxCenterScale'},
            {'type': 'TopdownAffine', 'input_size': (32, 32)},
            {'type': 'PackPoseInputs'},
        ],
    }
    with DefaultScope.overwrite_default_scope('mmpose'):
        data = DATASETS.build({'type': 'IndexedDataset', 'name': 'people', 'dataset': inner})
    assert data.metainfo['dataset_name'] == 'coco'
    loader = DataLoader(data, batch_size=3, collate_fn=pseudo_collate, num_workers=2)
    batches = [keys_of((batch['inputs'],), batch, len(batch['inputs']), 'test') for batch in loader]
    assert batches == [[('people', 0), ('people', 1), ('people', 2)], [('people', 3), ('people', 4)]]
    assert data[0]['data_samples'].metainfo['id'] == 1


# ---------------------------------------------------------------- bad input
def test_a_stream_has_no_index() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    for dataset in (Stream(), iter([1]), 5):
        with pytest.raises(TypeError, match=f'dataset is a {type(dataset).__name__}, whose samples have no index'):
            IndexedDataset(dataset)


@pytest.mark.parametrize('name', [None, 3, ('a',)])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name=.* is not allowed.*dict\(type='IndexedDataset', name='coco'"):
        IndexedDataset([{}], name=name)


@pytest.mark.parametrize('sample', [torch.zeros(2), None, Pair(1, 2), 'text', 3])
def test_a_sample_that_takes_no_key(sample: Any) -> None:
    with pytest.raises(TypeError, match=rf'a {type(sample).__name__}, to which no key .* Return.*dict\(inputs=image'):
        IndexedDataset([sample])[0]


def test_an_entry_of_that_name_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match="entry 'sample_key' of their own"):
        IndexedDataset([{'sample_key': 'mine'}])[0]


def test_an_index_that_means_another_sample_every_time() -> None:
    datasets = pytest.importorskip('mmpose.datasets')
    combined = datasets.CombinedDataset(metainfo={'from_file': 'configs/_base_/datasets/coco.py'}, datasets=[])
    IndexedDataset(combined)
    combined.resample = True
    for dataset in (combined, ConcatDataset([Made(as_dict), combined])):
        with pytest.raises(ValueError, match=r"(?s)sample_ratio_factor.*name='first'.*meta_keys=\('sample_key'"):
            IndexedDataset(dataset)


def test_without_it_there_is_no_id() -> None:
    (batch,) = DataLoader(Made(as_dict, 2), batch_size=2)
    with pytest.raises(SampleIdError):
        keys_of((), batch, 2, 'test')
