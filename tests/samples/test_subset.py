"""A model call on some of its samples: what is taken apart, and what is shared by all samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.rng import RandomState
from mm_sharp.samples.selection import IntArray
from mm_sharp.samples.subset import call_size, subset

N, ROWS = 6, [1, 4]
INDICES = {'host': np.array(ROWS), 'tensor': torch.tensor(ROWS)}
indices = pytest.mark.parametrize('rows', INDICES.values(), ids=INDICES)


def call(*args: Any, **kwargs: Any) -> ModelCall:
    """A call of a model on ``args`` and ``kwargs`` that gave an output."""
    return ModelCall(nn.Linear(2, 1), args, kwargs, RandomState.capture(()), output='the output')


def numbered(*shape: int, rows: int = N) -> Tensor:
    """A tensor (rows, *shape) whose values tell the rows apart."""
    return torch.arange(rows * int(np.prod(shape)), dtype=torch.float32).reshape(rows, *shape)


def pictures(channels: int, rows: int = N) -> list[Tensor]:
    """Pictures of different sizes."""
    return [torch.full((channels, 4 + row, 5), float(row)) for row in range(rows)]


def data_samples(rows: int = N) -> list[BaseDataElement]:
    return [BaseDataElement(metainfo=dict(sample_idx=row)) for row in range(rows)]


@indices
def test_tensors_positional_and_by_name(rows: IntArray | Tensor) -> None:
    inputs, targets = numbered(2, 3), numbered()
    part = subset(call(inputs, targets=targets), rows, N)
    assert torch.equal(part.args[0], inputs[ROWS])
    assert torch.equal(part.kwargs['targets'], targets[ROWS])


@indices
def test_data_samples_beside_a_stacked_tensor(rows: IntArray | Tensor) -> None:
    inputs, samples = numbered(3, 4, 4), data_samples()
    part = subset(call(inputs=inputs, data_samples=samples, mode='loss'), rows, N)
    assert torch.equal(part.kwargs['inputs'], inputs[ROWS])
    assert [id(sample) for sample in part.kwargs['data_samples']] == [id(samples[row]) for row in ROWS]
    assert part.kwargs['mode'] == 'loss'


@indices
@pytest.mark.parametrize('channels', [3, N], ids=['3 channels', 'as many channels as samples'])
def test_data_samples_beside_pictures_of_different_sizes(rows: IntArray | Tensor, channels: int) -> None:
    inputs = pictures(channels)
    part = subset(call(inputs=inputs, data_samples=data_samples()), rows, N)
    assert [id(picture) for picture in part.kwargs['inputs']] == [id(inputs[row]) for row in ROWS]


def test_pictures_without_data_samples() -> None:
    inputs, targets = pictures(3), numbered(2)
    part = subset(call(inputs, targets), np.array(ROWS), N)
    assert [id(picture) for picture in part.args[0]] == [id(inputs[row]) for row in ROWS]
    assert torch.equal(part.args[1], targets[ROWS])


def test_positional_data_samples_beside_as_many_channels_as_samples() -> None:
    inputs = pictures(channels=N)
    part = subset(call(inputs, data_samples()), np.array(ROWS), N)
    assert [tuple(picture.shape) for picture in part.args[0]] == [(N, 5, 5), (N, 8, 5)]


@indices
def test_nested_dicts_lists_and_tuples(rows: IntArray | Tensor) -> None:
    colour, depth, x, y = numbered(3), numbered(1), numbered(4), numbered(7)
    inputs = {'colour': colour, 'more': {'depth': depth}}
    part = subset(call(inputs, targets=(x, [y, data_samples()])), rows, N)
    assert torch.equal(part.args[0]['colour'], colour[ROWS])
    assert torch.equal(part.args[0]['more']['depth'], depth[ROWS])
    targets = part.kwargs['targets']
    assert (type(targets), type(targets[1])) == (tuple, list)
    assert torch.equal(targets[0], x[ROWS])
    assert torch.equal(targets[1][0], y[ROWS])
    assert [sample.sample_idx for sample in targets[1][1]] == ROWS


def test_lists_of_lists_hold_samples() -> None:
    boxes = [[torch.zeros(4)] * row for row in range(1, N + 1)]
    part = subset(call(numbered(2), boxes=boxes), np.array(ROWS), N)
    assert [len(found) for found in part.kwargs['boxes']] == [row + 1 for row in ROWS]


def test_a_tuple_of_samples_stays_a_tuple() -> None:
    part = subset(call(numbered(2), tuple(data_samples())), np.array(ROWS), N)
    assert isinstance(part.args[1], tuple)
    assert [sample.sample_idx for sample in part.args[1]] == ROWS


def test_what_has_no_row_for_every_sample_is_shared() -> None:
    shared: dict[str, Any] = dict(
        mode='loss', size=(N, N), flag=None, factor=2.5, weights=torch.ones(N + 1), scale=torch.tensor(2.0), names=[]
    )
    part = subset(call(numbered(2), **shared), np.array(ROWS), N)
    assert part.kwargs.keys() == shared.keys()
    for name, value in shared.items():
        same = part.kwargs[name]
        assert same is value or same == value


@pytest.mark.parametrize('value', [torch.tensor(2.0), torch.ones(N + 1)], ids=['number', 'vector'])
def test_a_shared_tensor_before_a_batched_one(value: Tensor) -> None:
    inputs, targets = numbered(2), numbered(3)
    part = subset(call(inputs=inputs, scale=value, targets=targets), np.array(ROWS), N)
    assert torch.equal(part.kwargs['inputs'], inputs[ROWS])
    assert torch.equal(part.kwargs['targets'], targets[ROWS])
    part = subset(call(inputs, {'scale': value}, {'scale': targets}), np.array(ROWS), N)
    assert torch.equal(part.args[2]['scale'], targets[ROWS])


@pytest.mark.parametrize('values', [list(range(N)), [f'picture {row}' for row in range(N)]], ids=['numbers', 'strings'])
def test_lists_of_plain_values_hold_samples(values: list[Any]) -> None:
    """Labels as MMEngine's default collate function gives them: N numbers in a list."""
    part = subset(call(pictures(3), labels=values), np.array(ROWS), N)
    assert part.kwargs['labels'] == [values[row] for row in ROWS]


def test_the_given_call_is_not_changed() -> None:
    inputs, samples = numbered(2), data_samples()
    whole = call({'inputs': inputs}, data_samples=samples)
    part = subset(whole, np.array(ROWS), N)
    assert whole.args[0]['inputs'] is inputs
    assert whole.kwargs['data_samples'] is samples
    assert len(samples) == N
    assert whole.output == 'the output'
    assert part.output is None
    assert (part.model, part.random_state) == (whole.model, whole.random_state)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.int64, torch.bool])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    inputs = numbered(2).to(dtype)
    assert torch.equal(subset(call(inputs), np.array(ROWS), N).args[0], inputs[ROWS])


def test_rows_may_be_repeated_and_in_any_order() -> None:
    inputs, samples = numbered(2), data_samples()
    part = subset(call(inputs, data_samples=samples), np.array([5, 0, 5]), N)
    assert torch.equal(part.args[0], inputs[[5, 0, 5]])
    assert [sample.sample_idx for sample in part.kwargs['data_samples']] == [5, 0, 5]


def test_of_one_sample() -> None:
    inputs, samples = numbered(2, rows=1), data_samples(1)
    part = subset(call(inputs=inputs, data_samples=samples), np.array([0]), 1)
    assert torch.equal(part.kwargs['inputs'], inputs)
    assert part.kwargs['data_samples'][0] is samples[0]


@pytest.mark.parametrize(
    ('given', 'size'),
    [
        (call(numbered(2)), N),
        (call(inputs=numbered(2), mode='loss'), N),
        (call(inputs=pictures(3), data_samples=data_samples(4)), 4),
        (call(pictures(3)), N),
        (call({'colour': numbered(3)}), N),
        (call('loss', torch.tensor(1.0), [numbered(3), numbered(2)], numbered(4)), N),
    ],
    ids=['tensor', 'by name', 'data samples', 'list', 'dict', 'tensor after others'],
)
def test_call_size(given: ModelCall, size: int) -> None:
    assert call_size('AUSAMOptimWrapper', given) == size


@pytest.mark.parametrize(
    ('given', 'types'),
    [
        (call('loss', 3, scale=2.0), 'str, int, float'),
        (call(), ''),
        (call(torch.empty(0, 3)), 'Tensor'),
        (call(inputs=torch.empty(0, 3), data_samples=[]), 'Tensor, list'),
        (call([1, 2, 3]), 'list'),
    ],
    ids=['plain values', 'nothing', 'no rows', 'no data samples', 'numbers'],
)
def test_a_call_without_a_batch(given: ModelCall, types: str) -> None:
    with pytest.raises(
        ValueError, match=rf'AUSAMOptimWrapper found no batch .* \({types}\) that Linear was called with'
    ):
        call_size('AUSAMOptimWrapper', given)


class Pair(NamedTuple):
    """Named, as some collate functions leave batches."""

    left: Tensor
    right: Tensor


class Rows:
    """A collection of a kind of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_arrays_are_taken_apart_as_tensors_are() -> None:
    array = np.arange(10).reshape(5, 2)
    kept = subset(call(torch.zeros(5, 1), array, np.float64(3.0)), np.array([4, 1]), 5)
    np.testing.assert_array_equal(kept.args[1], array[[4, 1]])
    assert kept.args[2] == 3.0


@pytest.mark.parametrize('unknown', [Pair(torch.zeros(5), torch.zeros(5)), Rows(5), {'inner': [Rows(5), None]}])
def test_what_would_silently_keep_all_samples_is_refused(unknown: object) -> None:
    with pytest.raises(TypeError, match=r'take samples out of a (Pair|Rows) of (5|2)'):
        subset(call(torch.zeros(5, 1), unknown), np.array([0]), 5)


def test_named_tuples_of_numbers_and_other_lengths_are_shared() -> None:
    size = torch.Size([3, 4, 5, 6, 7])
    kept = subset(call(torch.zeros(5, 1), size, Rows(4)), np.array([0]), 5)
    assert kept.args[1] is size
