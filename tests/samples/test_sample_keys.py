"""Keys of a batch's samples: where they are found, and what is said where they are not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn
from torch.utils.data._utils.collate import default_collate as torch_collate
from torch.utils.data._utils.pin_memory import pin_memory

from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import SampleIdError, SampleKey, id_field, key_of, keys_of, without_keys
from tests.toys import ToySamples

KEYS = [SampleKey.of('coco', 3), SampleKey.of('coco', 1)]
PAIRS = [('coco', 3), ('coco', 1)]
OWNER = 'AUSAMOptimWrapper'


def samples(*metainfo: dict[str, Any]) -> list[BaseDataElement]:
    return [BaseDataElement(metainfo=info) for info in metainfo]


# ---------------------------------------------------------------- SampleKey
@pytest.mark.parametrize(('name', 'index'), [('coco', 7), ('', 0), ('a:b:3', 12), ('x', -4), ('ü 1', 2**63 - 1)])
def test_a_key_is_what_it_was_made_of(name: str, index: int) -> None:
    key = SampleKey.of(name, index)
    assert key.key == (name, index)
    assert key == f'{name}:{index}'


@pytest.mark.parametrize(
    'carry',
    [
        lambda key: pickle.loads(pickle.dumps(key)),
        copy.copy,
        copy.deepcopy,
        lambda key: torch_collate([key, key])[1],
        lambda key: default_collate([key, key])[1],
        lambda key: pseudo_collate([key, key])[1],
        lambda key: torch_collate([(1, key), (2, key)])[1][0],
        lambda key: default_collate([(1, key), (2, key)])[1][0],
        lambda key: pseudo_collate([{'sample_key': key}] * 2)['sample_key'][0],
        lambda key: BaseDataPreprocessor().cast_data({'a': [key], 'b': (key,)})['b'][0],
        lambda key: pin_memory([key])[0],
        lambda key: BaseDataElement(metainfo={'k': key}).to('cpu').k,
    ],
)
def test_a_key_stays_a_key_on_its_way_to_the_model(carry: Any) -> None:
    carried = carry(KEYS[0])
    assert type(carried) is SampleKey
    assert carried.key == ('coco', 3)


# ---------------------------------------------------------------- the rule
@pytest.mark.parametrize(
    ('fields', 'key', 'field'),
    [
        ({'id': 5, 'img_id': 6, 'sample_idx': 7, 'dataset_name': 'mpii'}, ('mpii', 5), 'id'),
        ({'id': np.int32(5), 'img_id': 6}, ('', 5), 'id'),
        ({'id': [5, 8], 'img_id': np.int64(6), 'sample_idx': 7, 'dataset_name': 'coco'}, ('coco', 6), 'img_id'),
        ({'id': np.array([5, 8]), 'img_id': 6}, ('', 6), 'img_id'),
        ({'id': [], 'img_id': 6}, ('', 6), 'img_id'),
        ({'img_id': 6, 'sample_idx': 7, 'dataset_name': None}, ('', 6), 'img_id'),
        ({'img_id': '0006.jpg', 'sample_idx': 7}, ('', 7), 'sample_idx'),
        ({'sample_idx': 0}, ('', 0), 'sample_idx'),
        ({'id': -(2**63)}, ('', -(2**63)), 'id'),
    ],
)
def test_the_rule(fields: dict[str, Any], key: tuple[str, int], field: str) -> None:
    found = key_of(fields)
    assert found == key
    assert type(found[1]) is int
    assert id_field(fields) == field
    assert keys_of((), {'data_samples': samples(fields)}, 1, OWNER) == [key]


def test_a_stored_key_comes_first() -> None:
    assert key_of({'sample_key': KEYS[0], 'id': 9, 'dataset_name': 'x'}) == ('coco', 3)


@pytest.mark.parametrize(
    ('fields', 'reason'),
    [
        ({}, "no 'id', 'img_id' or 'sample_idx'"),
        ({'id': None, 'img_id': 'a.jpg'}, "no 'id', 'img_id' or 'sample_idx'"),
        ({'id': True}, 'id=True is no integer'),
        ({'id': 1.0}, 'id=1.0 is no integer'),
        # Falling back on the picture would mix people up.
        ({'id': '17', 'img_id': 3}, "id='17' is no integer"),
        ({'img_id': 2.5, 'sample_idx': 1}, 'img_id=2.5 is no integer'),
        ({'sample_idx': np.bool_(True)}, 'sample_idx=.* is no integer'),
        ({'id': 2**63}, 'id=9223372036854775808 has more than 64 bits'),
        ({'sample_idx': np.uint64(2**64 - 1)}, 'sample_idx=.*18446744073709551615.* has more than 64 bits'),
        ({'id': 1, 'dataset_name': 3}, 'dataset_name=3 is no string'),
        ({'sample_key': 'coco:3'}, "sample_key='coco:3' is no SampleKey"),
    ],
)
def test_what_identifies_no_sample(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleIdError, match=reason):
        key_of(fields)


# ---------------------------------------------------------------- batches
@pytest.mark.parametrize(
    ('args', 'kwargs'),
    [
        ((torch.zeros(2), KEYS), {}),
        ((torch.zeros(2), tuple(KEYS)), {'mode': 'loss'}),
        ((), {'inputs': torch.zeros(2), 'sample_key': KEYS}),
        (([torch.zeros(2), torch.zeros(2), KEYS],), {}),
        (({'image': torch.zeros(2), 'sample_key': KEYS},), {'mode': 'loss'}),
        # Keys of the loader come before what the data samples say.
        ((KEYS,), {'data_samples': samples({'id': 8}, {'id': 9})}),
        ((torch.zeros(2),), {'data_samples': samples(*({'sample_key': key, 'id': 0} for key in KEYS))}),
        ((torch.zeros(2), samples(*({'id': i, 'dataset_name': n} for n, i in PAIRS))), {'mode': 'loss'}),
        (({'inputs': 0, 'data_samples': samples(*({'id': i, 'dataset_name': n} for n, i in PAIRS))},), {}),
        ((), {'data_samples': tuple(samples({'img_id': 3, 'dataset_name': 'coco'}, {'sample_key': KEYS[1]}))}),
        ((), {'sample_idx': [3, 1], 'dataset_name': 'coco'}),
        ((), {'sample_idx': torch.tensor([3, 1]), 'dataset_name': ['coco', 'coco']}),
        ((), {'sample_idx': np.array([3, 1], np.uint8), 'dataset_name': ('coco', 'coco')}),
        ((), {'sample_idx': [3, 1], 'dataset_name': np.array(['coco', 'coco'])}),
        (({'sample_idx': torch.tensor([3, 1]), 'dataset_name': 'coco'},), {}),
    ],
)  # fmt: skip
def test_keys_of_a_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert keys_of(args, kwargs, 2, OWNER) == PAIRS


def test_without_a_name_it_is_empty() -> None:
    assert keys_of((), {'sample_idx': torch.arange(3)}, 3, OWNER) == [('', 0), ('', 1), ('', 2)]


@pytest.mark.parametrize(
    ('args', 'kwargs', 'reason'),
    [
        ((torch.zeros(2),), {'mode': 'loss'}, "the fields .'mode'.: sample_idx is missing"),
        ((torch.zeros(2),), {}, 'neither data samples nor sample_idx'),
        ((), {'data_samples': samples({'ori_shape': 1}, {'ori_shape': 1})}, r"the meta keys \['ori_shape'\]"),
        ((), {'data_samples': [*samples({'id': 1}), 'x']}, 'one of them is a str'),
        ((), {'data_samples': samples({'id': 1})}, 'there are 1 of them for a batch of 2 samples'),
        ((KEYS * 2,), {}, 'there are 4 of them for a batch of 2 samples'),
        (([KEYS[0], 'coco:1'],), {}, "sample_key='coco:1' is no SampleKey"),
        ((), {'sample_idx': [1, 2, 3]}, 'there are 3 of them for a batch of 2'),
        ((), {'sample_idx': [1, True]}, 'sample_idx=True is no integer'),
        ((), {'sample_idx': [1, -(2**63) - 1]}, 'sample_idx=-9223372036854775809 has more than 64 bits'),
        ((), {'sample_idx': [1, 2], 'dataset_name': torch.tensor([0, 1])}, 'dataset_name=1 is no string'),
        ((), {'sample_idx': [1, 2], 'dataset_name': ['a']}, 'there are 1 of dataset_name for 2 of sample_idx'),
        ((), {'sample_idx': torch.tensor([1.0, 2.0])}, 'sample_idx=1.0 is no integer'),
        ((), {'sample_idx': torch.tensor([[1], [2]])}, r'sample_idx=\[1\] is no integer'),
        ((), {'sample_idx': torch.tensor(7)}, r'no list, and no tensor \(N,\)'),
    ],
)
def test_samples_that_cannot_be_told_apart(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleIdError, match=reason) as caught:
        keys_of(args, kwargs, 2, OWNER)
    message = str(caught.value)
    assert message.startswith(OWNER)
    assert "dict(type='PackPoseInputs', meta_keys=('id', 'img_id', 'dataset_name', ...))" in message
    assert "type='IndexedDataset', dataset=_base_.train_dataloader.dataset" in message


def test_people_of_one_picture_are_not_mixed_up() -> None:
    """MMPose's crops of two people have one ``img_id``; MMDetection's pictures have nothing else."""
    found = samples({'img_id': 4}, {'img_id': 4})
    for sample in found:
        sample.gt_instances = InstanceData(bboxes=torch.zeros(1, 4))
    assert keys_of((), {'data_samples': found}, 2, OWNER) == [('', 4), ('', 4)]
    for sample in found:
        sample.gt_instances.keypoints = torch.zeros(1, 17, 2)
    with pytest.raises(SampleIdError, match="'id' is missing, and people of one picture"):
        keys_of((), {'data_samples': found}, 2, OWNER)
    for sample in found:
        sample.set_metainfo({'id': [1, 2]})
    assert keys_of((), {'data_samples': found}, 2, OWNER) == [('', 4), ('', 4)]


def test_the_message_s_config_lines_work(tmp_path: Path) -> None:
    with pytest.raises(SampleIdError) as caught:
        keys_of((), {}, 1, OWNER)
    (line,) = [line.strip() for line in str(caught.value).splitlines() if 'train_dataloader = ' in line]
    (tmp_path / 'base.py').write_text("train_dataloader = dict(batch_size=2, dataset=dict(type='ToySamples', count=3))")
    (tmp_path / 'mine.py').write_text(f"_base_ = ['base.py']\n{line}\n")
    loader = Config.fromfile(str(tmp_path / 'mine.py')).train_dataloader
    built = DATASETS.build(loader.dataset)
    assert isinstance(built, IndexedDataset)
    assert isinstance(built.dataset, ToySamples)
    assert loader.batch_size == 2


# ---------------------------------------------------------------- keys out of the call
class Plain(nn.Module):
    def forward(self, inputs: Any, labels: Any = None, mode: str = 'loss') -> Any: ...


class Named(nn.Module):
    def forward(self, inputs: Any, sample_key: Any, mode: str = 'loss') -> Any: ...


class Any_(nn.Module):  # noqa: N801
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


IMAGES = torch.zeros(2)


@pytest.mark.parametrize(
    ('model', 'args', 'kwargs', 'left_args', 'left_kwargs'),
    [
        (Plain(), (IMAGES, IMAGES, KEYS), {'mode': 'loss'}, (IMAGES, IMAGES), {'mode': 'loss'}),
        (Plain(), (), {'inputs': IMAGES, 'sample_key': KEYS}, (), {'inputs': IMAGES}),
        (Plain(), ([IMAGES, tuple(KEYS)],), {}, ([IMAGES],), {}),
        (Plain(), ({'image': IMAGES, 'sample_key': KEYS},), {}, ({'image': IMAGES},), {}),
        (Plain(), (IMAGES, ['a:1', 'b:2']), {'other': []}, (IMAGES, ['a:1', 'b:2']), {'other': []}),
        (nn.DataParallel(Plain()), (IMAGES, KEYS), {}, (IMAGES,), {}),
        (Named(), (), {'inputs': IMAGES, 'sample_key': KEYS}, (), {'inputs': IMAGES, 'sample_key': KEYS}),
        (Named(), (IMAGES, KEYS), {}, (IMAGES, KEYS), {}),
        (Any_(), (IMAGES, KEYS), {}, (IMAGES,), {}),
        (Any_(), (IMAGES,), {'sample_key': KEYS}, (IMAGES,), {'sample_key': KEYS}),
    ],
)  # fmt: skip
def test_the_model_never_sees_the_keys(
    model: nn.Module, args: tuple[Any, ...], kwargs: Any, left_args: tuple[Any, ...], left_kwargs: Any
) -> None:
    before = copy.copy(args), copy.copy(kwargs)
    assert without_keys(model, args, kwargs) == (left_args, left_kwargs)
    assert (args, kwargs) == before


def test_the_caller_s_containers_stay_whole() -> None:
    batch = {'image': IMAGES, 'sample_key': KEYS}
    listed = [IMAGES, KEYS]
    without_keys(Plain(), (batch, listed), {})
    assert list(batch) == ['image', 'sample_key']
    assert len(listed) == 2


def test_data_samples_are_left_as_they_are() -> None:
    found = samples({'sample_key': KEYS[0]}, {'sample_key': KEYS[1]})
    _, kwargs = without_keys(Plain(), (), {'data_samples': found})
    assert kwargs['data_samples'] is found
