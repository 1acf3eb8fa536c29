"""Keys before loading are the keys of the batches, however data sets are nested; combined ones do not collide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ClassBalancedDataset, pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.indexed_dataset import IndexedDataset
from mm_sharp.samples.keys import SampleIdError, keys_of
from tests.tiny_data import draw_coco, draw_mpii

SIZE = 7
TO_SCALE = {'type': 'GetBBoxCenterScale'}  # MPII's annotations have it already
CENTRED = [{'type': 'LoadImage'}, {'type': 'TopdownAffine', 'input_size': (32, 32)}, {'type': 'PackPoseInputs'}]
CROP = [TO_SCALE, *CENTRED]
PICTURE = [{'type': 'LoadImage'}, {'type': 'BottomupResize', 'input_size': (32, 32)}, {'type': 'PackPoseInputs'}]
TO_COCO = {'type': 'KeypointConverter', 'num_keypoints': 17, 'mapping': [(i, i) for i in range(16)]}


@DATASETS.register_module()
class Rows(BaseDataset):
    """A data set of MMEngine's without pictures; ``ann_file`` says which one it stands for."""

    def __init__(self, start: int = 0, fields: tuple[str, ...] = (), **kwargs: Any) -> None:
        self.start, self.fields = start, fields
        # Serialised, each would have all garbage collected, when the tests are collected.
        super().__init__(serialize_data=False, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        return [{'value': i, **dict.fromkeys(self.fields, self.start + 10 * i)} for i in range(SIZE)]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [1 if idx else 2]


class Packing:
    """A transform in the manner of the OpenMMLab projects' last ones."""

    def __init__(self, *meta_keys: str) -> None:
        self.meta_keys = meta_keys

    def __call__(self, info: dict[str, Any]) -> dict[str, Any]:
        shown = {key: info[key] for key in self.meta_keys if key in info}
        return {'inputs': torch.zeros(1), 'data_samples': BaseDataElement(metainfo=shown)}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn data: COCO's ids differ from the pictures', whose first has two people; MPII's ids go from 0."""
    folder = tmp_path_factory.mktemp('pictures')
    draw_mpii(folder / 'mpii', count=5)
    draw_coco(folder / 'coco', train=6, val=3)
    for split, start in (('train', 100), ('val', 500)):
        file = folder / 'coco' / 'annotations' / f'person_keypoints_{split}.json'
        content = json.loads(file.read_text())
        people = content['annotations']
        people.append(dict(people[0]))
        for number, person in enumerate(people):
            person['id'] = start + number
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    pytest.importorskip('mmpose.datasets')
    with DefaultScope.overwrite_default_scope('mmpose'):
        yield


def coco(folder: Path, split: str = 'train', pipeline: Any = CROP, **kwargs: Any) -> dict[str, Any]:
    return {
        'type': 'CocoDataset',
        'data_root': str(folder / 'coco'),
        'ann_file': f'annotations/person_keypoints_{split}.json',
        'data_prefix': {'img': f'{split}/'},
        'pipeline': pipeline,
        **kwargs,
    }


def mpii(folder: Path, pipeline: Any = CENTRED) -> dict[str, Any]:
    return {
        'type': 'MpiiDataset',
        'data_root': str(folder / 'mpii'),
        'ann_file': 'annotations/mpii_train.json',
        'data_prefix': {'img': 'images/'},
        'pipeline': pipeline,
    }


def combined(*datasets: dict[str, Any], pipeline: Any = CENTRED, **kwargs: Any) -> dict[str, Any]:
    metainfo = {'from_file': 'configs/_base_/datasets/coco.py'}
    return {'type': 'CombinedDataset', 'metainfo': metainfo, 'datasets': datasets, 'pipeline': pipeline, **kwargs}


def packing(*meta_keys: str, pipeline: Any = CENTRED) -> list[dict[str, Any]]:
    return [*pipeline[:-1], {'type': 'PackPoseInputs', 'meta_keys': meta_keys}]


def agreed(dataset: Any) -> list[tuple[str, int]]:
    """The keys of all samples, after a check that batches in another order show the same."""
    built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    keys = DatasetKeys(built)
    order = torch.randperm(len(built)).tolist()
    chunks = [order[i : i + 4] for i in range(0, len(order), 4)]
    for indices, batch in zip(chunks, DataLoader(built, batch_sampler=chunks, collate_fn=pseudo_collate), strict=True):
        assert keys.keys(indices) == keys_of((), batch, len(indices), 'test')
    return keys.keys(range(len(built)))


# ---------------------------------------------------------------- the same key before and after loading
def test_mmpose_s_crops(pictures: Path) -> None:
    # Two people of the first picture are two samples.
    assert sorted(agreed(coco(pictures))) == [('coco', 100 + i) for i in range(7)]
    assert agreed(mpii(pictures)) == [('mpii', i) for i in range(5)]
    assert sorted(agreed(coco(pictures, serialize_data=False))) == sorted(agreed(coco(pictures)))


def test_mmpose_s_pictures(pictures: Path) -> None:
    assert agreed(coco(pictures, pipeline=PICTURE, data_mode='bottomup')) == [('coco', i) for i in range(1, 7)]


def test_recipes_that_do_not_pack_the_data_set_s_name(pictures: Path) -> None:
    """As those of DEKR and of associative embedding."""
    pipeline = packing('id', 'img_id', 'img_path', pipeline=PICTURE)
    assert agreed(coco(pictures, pipeline=pipeline, data_mode='bottomup')) == [('', i) for i in range(1, 7)]


def test_mmpose_s_combined_data_sets(pictures: Path) -> None:
    data = combined(mpii(pictures, [TO_COCO]), coco(pictures, pipeline=[TO_SCALE]))
    keys = agreed(data)
    assert keys[:5] == [('mpii', i) for i in range(5)]
    assert sorted(keys[5:]) == [('coco', 100 + i) for i in range(7)]
    # The key that an IndexedDataset inside adds is lost unless the pipeline around it packs it.
    indexed = [{'type': 'IndexedDataset', 'name': f'n{i}', 'dataset': d} for i, d in enumerate(data['datasets'])]
    assert agreed(combined(*indexed)) == keys
    expected = [('n0', i) for i in range(5)] + [('n1', i) for i in range(7)]
    assert agreed(combined(*indexed, pipeline=packing('sample_key', 'id'))) == expected
    assert agreed({'type': 'IndexedDataset', 'dataset': data}) == [('dataset', i) for i in range(12)]
    # What packs is the outermost pipeline that packs at all.
    assert agreed(combined({**data, 'pipeline': []}, pipeline=packing('id'))) == [('', i) for _, i in keys]


def test_mmpose_s_data_sets_that_pack_before_they_are_combined(pictures: Path) -> None:
    data = DATASETS.build(combined(mpii(pictures), coco(pictures, pipeline=packing('id', pipeline=CROP)), pipeline=[]))
    expected = [('mpii', i) for i in range(5)] + [('', i) for _, i in DatasetKeys(data).keys(range(5, 12))]
    assert DatasetKeys(data).keys(range(12)) == expected
    assert [keys_of((), {'data_samples': [data[i]['data_samples']]}, 1, 'test')[0] for i in range(12)] == expected


@pytest.mark.parametrize(
    ('fields', 'pipeline', 'expected'),
    [
        # Without a transform that packs, the batch is the annotation, and sample_idx is what identifies it.
        (('id', 'img_id'), [], [('', i) for i in range(SIZE)]),
        (('id', 'img_id'), [Packing('id', 'img_id')], [('', 5 + 10 * i) for i in range(SIZE)]),
        (('img_id',), [Packing('img_id', 'sample_idx')], [('', 5 + 10 * i) for i in range(SIZE)]),
        (('img_id',), [Packing('ori_shape', 'sample_idx')], [('', i) for i in range(SIZE)]),
        (('id',), [Packing('id'), lambda packed: packed], [('', 5 + 10 * i) for i in range(SIZE)]),
    ],
)
def test_mmengine_s_data_sets(fields: tuple[str, ...], pipeline: Any, expected: Any) -> None:
    assert agreed(Rows(start=5, fields=fields, pipeline=pipeline)) == expected


def test_wrappers_in_each_other() -> None:
    rows = {'type': 'Rows', 'fields': ('id',), 'pipeline': [Packing('id')]}
    indexed = {'type': 'IndexedDataset', 'name': 'x', 'dataset': {**rows, 'pipeline': [Packing()]}}
    ids, places = [('', 10 * i) for i in range(SIZE)], [('x', i) for i in range(SIZE)]
    repeated = {'type': 'RepeatDataset', 'times': 2, 'dataset': rows}
    assert agreed(repeated) == ids * 2
    assert agreed({'type': 'ConcatDataset', 'datasets': [rows, repeated, rows]}) == ids * 4
    assert agreed({'type': 'RepeatDataset', 'times': 2, 'dataset': indexed}) == places * 2
    assert agreed(ConcatDataset([Subset(DATASETS.build(repeated), [8, 0]), DATASETS.build(rows)])) == [
        ids[1], ids[0], *ids,
    ]  # fmt: skip
    mixed = ConcatDataset([IndexedDataset(DATASETS.build(repeated), 'r'), DATASETS.build(indexed)])
    assert agreed(mixed) == [('r', i) for i in range(SIZE)] * 2 + places
    assert agreed(Subset(mixed, [15, 3, 8])) == [('x', 1), ('r', 3), ('r', 1)]
    balanced = ClassBalancedDataset(Rows(fields=('id',), pipeline=[Packing('id')]), 0.9)
    assert len(balanced) > SIZE
    assert sorted(set(agreed(balanced))) == ids


# ---------------------------------------------------------------- epochs cut short
def sliced(dataset: Any, batch_size: int, num_batch_per_epoch: int = 5) -> DataLoader[Any]:
    return Runner.build_dataloader(
        {
            'dataset': dataset,
            'batch_size': batch_size,
            'num_batch_per_epoch': num_batch_per_epoch,
            'sampler': {'type': 'DefaultSampler', 'shuffle': True},
        },
        seed=3,
    )


ROWS_CONFIG = {'type': 'Rows', 'fields': ('id',), 'pipeline': [Packing('id')]}
INDEXED = {'type': 'IndexedDataset', 'name': 'x', 'dataset': {**ROWS_CONFIG, 'pipeline': [Packing()]}}
PLACES = [('x', i) for i in range(SIZE)]


@pytest.mark.parametrize(
    ('dataset', 'batch_size', 'expected', 'count'),
    [
        (INDEXED, 1, PLACES[:5], 5),
        (ROWS_CONFIG, 1, [('', 10 * i) for i in range(5)], 5),
        ({'type': 'RepeatDataset', 'times': 2, 'dataset': INDEXED}, 2, (PLACES * 2)[:10], SIZE),
        # A data set that is repeated goes on beyond its end, also for the slice.
        ({'type': 'RepeatDataset', 'times': 2, 'dataset': INDEXED}, 4, (PLACES * 3)[:20], SIZE),
        (
            {**INDEXED, 'dataset': {'type': 'RepeatDataset', 'times': 1, 'dataset': INDEXED['dataset']}},
            2,
            (PLACES * 2)[:10],
            SIZE,
        ),
        (
            {'type': 'ConcatDataset', 'datasets': [INDEXED, {**INDEXED, 'name': 'y'}]},
            2,
            [*PLACES, ('y', 0), ('y', 1), ('y', 2)],
            10,
        ),
    ],
)
def test_num_batch_per_epoch(dataset: dict[str, Any], batch_size: int, expected: Any, count: int) -> None:
    loader = sliced(dataset, batch_size)
    keys = DatasetKeys(loader.dataset)
    order = list(loader.sampler)
    shown = [key for batch in loader for key in keys_of((), batch, batch_size, 'test')]
    assert len(shown) == 5 * batch_size
    assert keys.keys(order) == shown
    assert keys.count() == count
    assert sorted(shown) == sorted(expected)


class Unknown(Dataset[Any]):
    """A wrapper of whose indices nothing is known, with annotations of another numbering."""

    def __init__(self, place: str, inner: Any) -> None:
        vars(self)[place] = inner
        self.get_data_info = Rows(fields=('id',)).get_data_info

    def __len__(self) -> int:
        return SIZE


@pytest.mark.parametrize('place', ['dataset', '_dataset', 'datasets'])
def test_no_key_is_guessed_of_unknown_wrappers(place: str) -> None:
    inner = IndexedDataset(Rows(), 'x')
    around = Unknown(place, [Rows(), inner] if place == 'datasets' else inner)
    keys = DatasetKeys(ConcatDataset([Rows(), around]))
    keys.check_collisions()
    assert keys.keys([1]) == [('', 1)]
    with pytest.raises(SampleIdError, match=r'Unknown.*of its own(.|\n)*IndexedDataset'):
        keys.keys([SIZE])
    assert keys.count() == 2 * SIZE
    assert DatasetKeys(IndexedDataset(around, 'out')).keys([2]) == [('out', 2)]


# ---------------------------------------------------------------- how many
def test_count_counts_what_is_repeated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, index: int) -> None:
        raise AssertionError('read')

    monkeypatch.setattr(Rows, 'get_data_info', refuse)
    rows, other = Rows(ann_file='a.json'), Rows(ann_file='b.json')
    half = Subset(rows, [0, 2, 2, 5])
    repeated = {'type': 'RepeatDataset', 'times': 3, 'dataset': rows}
    for dataset, count in [
        (rows, 7),
        (half, 3),
        (Subset(rows, []), 0),
        (DATASETS.build(repeated), 7),
        (IndexedDataset(DATASETS.build(repeated)), 7),
        (ClassBalancedDataset(rows, 0.9), 7),
        (ConcatDataset([rows, rows, half, other]), 14),
        (ConcatDataset([half, Subset(rows, [5, 6])]), 4),
        # The same annotations, read twice; another part of them.
        (ConcatDataset([rows, Rows(ann_file='a.json')]), 7),
        (ConcatDataset([Rows(ann_file='a.json', indices=[i]) for i in (0, 1, 0)]), 2),
        (ConcatDataset([Rows(), Rows()]), 14),
        # Under two names, samples have two scores.
        (ConcatDataset([IndexedDataset(rows, 'a'), IndexedDataset(rows, 'a')]), 7),
        (ConcatDataset([IndexedDataset(rows, 'a'), IndexedDataset(rows, 'b')]), 14),
        (ConcatDataset([rows, Rows(ann_file='a.json', metainfo={'dataset_name': 'b'})]), 14),
    ]:
        assert DatasetKeys(dataset).count() == count


def test_count_of_mmpose_s_data_sets(pictures: Path) -> None:
    both = combined(mpii(pictures, [TO_COCO]), coco(pictures, pipeline=[]), sample_ratio_factor=[0.5, 2.0])
    assert DatasetKeys(DATASETS.build(both)).count() == 12
    crops, whole = coco(pictures), coco(pictures, pipeline=PICTURE, data_mode='bottomup')
    assert DatasetKeys(ConcatDataset([DATASETS.build(d) for d in (crops, whole, crops)])).count() == 7 + 6


# ---------------------------------------------------------------- reading
def test_nothing_is_loaded_and_annotations_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Rows(fields=('id',), pipeline=[Packing('id')])
    read: list[int] = []
    original = data.get_data_info

    def refuse(index: int) -> None:
        raise AssertionError('loaded')

    monkeypatch.setattr(data, 'prepare_data', refuse)
    monkeypatch.setattr(data, 'get_data_info', lambda index: read.append(index) or original(index))
    keys = DatasetKeys(data)
    assert read == []
    assert keys.keys([3, 3, 1]) == [('', 30), ('', 30), ('', 10)]
    assert keys.keys(np.array([1, 2])) == [('', 10), ('', 20)]
    assert sorted(read) == [1, 2, 3]
    assert keys.keys(range(SIZE))[1] == ('', 10)
    assert sorted(read) == list(range(SIZE))
    assert keys.keys([]) == []


def test_mmpose_s_annotations_are_what_its_data_set_says(pictures: Path) -> None:
    """The way around its copies of the metainfo gives the same fields."""
    data = DATASETS.build(coco(pictures))
    shown = data.get_data_info(2)
    assert DatasetKeys(data).keys([2]) == [(shown['dataset_name'], shown['id'])]


def test_a_data_set_that_is_not_read_yet(pictures: Path) -> None:
    data = DATASETS.build(coco(pictures, lazy_init=True))
    assert DatasetKeys(data).keys([0])[0][0] == 'coco'


# ---------------------------------------------------------------- no key
def test_a_data_set_without_annotations() -> None:
    class Bare(Dataset[int]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            return index

    keys = DatasetKeys(Bare())
    keys.check_collisions()
    with pytest.raises(SampleIdError, match=r"Bare: it has no get_data_info\(index\).*[\s\S]*type='IndexedDataset'"):
        keys.keys([0])
    assert DatasetKeys(IndexedDataset(Bare())).keys([2]) == [('dataset', 2)]


@pytest.mark.parametrize(
    ('meta_keys', 'reason'),
    [
        (('img_path',), r"will show at most \['img_path'\]: there is no 'id'"),
        # The people of one picture would share a score.
        (('img_id', 'dataset_name'), "'id' is missing, and several samples may have the same 'img_id'"),
    ],
)
def test_a_pipeline_that_packs_no_id(pictures: Path, meta_keys: tuple[str, ...], reason: str) -> None:
    keys = DatasetKeys(DATASETS.build(coco(pictures, pipeline=packing(*meta_keys, pipeline=CROP))))
    with pytest.raises(SampleIdError, match=reason):
        keys.keys([0])


def test_samples_that_are_drawn_while_loading(pictures: Path) -> None:
    data = combined(mpii(pictures, [TO_COCO]), coco(pictures, pipeline=[]), sample_ratio_factor=[0.5, 2.0])
    keys = DatasetKeys(DATASETS.build(data))
    with pytest.raises(SampleIdError, match=r'sample_ratio_factor(.|\n)*RepeatDataset'):
        keys.keys([0])
    # All of them may come.
    assert keys.count() == 5 + 7
    keys.check_collisions()


# ---------------------------------------------------------------- collisions
def packed_rows(start: int, file: str, *fields: str, **kwargs: Any) -> Rows:
    return Rows(start=start, fields=fields, ann_file=file, pipeline=[Packing(*fields, 'sample_idx')], **kwargs)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (packed_rows(0, 'a.json', 'id'), packed_rows(20, 'b.json', 'id')),
        (packed_rows(0, 'a.json', 'img_id'), packed_rows(0, 'b.json', 'img_id')),
        # The id of a person and that of a picture.
        (packed_rows(0, 'a.json', 'id'), packed_rows(0, 'a.json', 'img_id')),
        (packed_rows(0, 'a.json'), packed_rows(0, 'b.json')),
        # Other parts of one file, both numbered from 0.
        (packed_rows(0, 'a.json', indices=[0, 1]), packed_rows(0, 'a.json', indices=[2, 3])),
        (Rows(), Rows()),
        (IndexedDataset(Rows()), IndexedDataset(Rows())),
        (IndexedDataset(Rows(ann_file='a.json')), IndexedDataset(Rows(ann_file='b.json'))),
    ],
)
def test_samples_that_would_share_a_score(one: Any, other: Any) -> None:
    data = ConcatDataset([one, other])
    keys = DatasetKeys(data)
    with pytest.raises(SampleIdError, match=r'the same name .* and the same ids') as caught:
        keys.check_collisions()
    assert "dict(type='IndexedDataset', name='second', dataset=...)" in str(caught.value)
    for dataset in (one, other):
        assert (getattr(dataset, 'ann_file', '') or type(dataset).__name__) in str(caught.value)
    DatasetKeys(ConcatDataset([IndexedDataset(one, 'first'), IndexedDataset(other, 'second')])).check_collisions()


ROWS = packed_rows(0, 'a.json', 'id')


@pytest.mark.parametrize(
    'members',
    [
        [ROWS],
        [ROWS, ROWS],
        [ROWS, packed_rows(0, 'a.json', 'id')],
        [ROWS, packed_rows(0, 'a.json', 'id', indices=[3, 2])],
        [ROWS, packed_rows(5, 'b.json', 'id')],
        [packed_rows(0, 'a.json'), packed_rows(0, 'a.json')],
        [IndexedDataset(ROWS, 'a'), IndexedDataset(ROWS, 'a')],
        [IndexedDataset(Rows(), 'a'), IndexedDataset(Rows(), 'b'), Rows()],
        # What of them can be loaded has other ids.
        [Subset(ROWS, [0, 1]), Subset(packed_rows(0, 'b.json', 'id'), [2, 3])],
        [ROWS, Subset(packed_rows(0, 'b.json', 'id'), [])],
    ],
)
def test_samples_that_share_nothing_or_are_the_same(members: list[Any]) -> None:
    DatasetKeys(ConcatDataset(members)).check_collisions()


def test_mmpose_s_splits(pictures: Path) -> None:
    DatasetKeys(ConcatDataset([DATASETS.build(coco(pictures, split)) for split in ('train', 'val')])).check_collisions()
    DatasetKeys(DATASETS.build(combined(mpii(pictures, [TO_COCO]), coco(pictures, pipeline=[])))).check_collisions()
    # Without the name, MPII's ids and these pictures' meet.
    data = combined(
        mpii(pictures, [TO_COCO]),
        coco(pictures, pipeline=[], data_mode='bottomup'),
        pipeline=packing('id', 'img_id'),
    )
    with pytest.raises(SampleIdError, match=r'(?s)4 samples of two combined data sets.*mpii_train.*person_keyp'):
        DatasetKeys(DATASETS.build(data)).check_collisions()


def test_ids_are_read_only_where_names_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = packed_rows(0, 'a.json', 'id'), packed_rows(0, 'b.json', 'id')
    read: list[int] = []
    for dataset, name in ((one, 'a'), (other, 'b')):
        dataset.pipeline.transforms[0].meta_keys = ('id', 'dataset_name')
        original = dataset.get_data_info
        monkeypatch.setattr(
            dataset,
            'get_data_info',
            lambda i, original=original, name=name: read.append(i) or {**original(i), 'dataset_name': name},
        )
    DatasetKeys(ConcatDataset([one, other])).check_collisions()
    assert read == [0, 0]
