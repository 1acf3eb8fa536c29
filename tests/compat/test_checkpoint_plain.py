"""What ``to_plain`` writes and ``from_plain`` rebuilds."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mm_sharp.compat.plain_checkpoint import TAG, from_plain, to_plain
from tests.checkpoints import through_disk


def there_and_back(value: Any) -> Any:
    left: list[str] = []
    plain = to_plain(value, left)
    assert left == []
    return from_plain(through_disk(plain))


def assert_same_history(got: HistoryBuffer, expected: HistoryBuffer) -> None:
    assert type(got) is HistoryBuffer
    assert got.max_length == expected.max_length
    for new, old in zip(got.data, expected.data, strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


@given(
    npst.arrays(
        st.one_of(
            npst.boolean_dtypes(),
            npst.integer_dtypes(endianness='?'),
            npst.floating_dtypes(endianness='?'),
            npst.complex_number_dtypes(),
            npst.unicode_string_dtypes(),
            npst.byte_string_dtypes(),
            npst.datetime64_dtypes(),
        ),
        npst.array_shapes(min_dims=0, min_side=0, max_side=4),
    )
)
def test_arrays_come_back(array: np.ndarray) -> None:
    got = there_and_back(array)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()
    assert got.flags.writeable


def test_array_in_any_layout() -> None:
    array = np.arange(12.0).reshape(3, 4).T[::2]
    array.flags.writeable = False
    np.testing.assert_array_equal(there_and_back(array), array)


def test_history_comes_back_exactly() -> None:
    history = HistoryBuffer(max_length=5)
    for step in range(9):
        history.update(0.1 * step, step + 1)
    got = there_and_back(history)
    assert_same_history(got, history)
    assert got.mean(3) == history.mean(3)
    got.update(1.0)
    assert len(got.data[0]) == 5


@pytest.mark.parametrize('log', [[], [float('nan'), float('inf'), -0.0], [1, 2, 3], [2**53 + 1]])
def test_history_of_odd_values(log: list[float]) -> None:
    history = HistoryBuffer(log, [1] * len(log))
    got = there_and_back(history)
    assert_same_history(got, history)
    assert got.data[0].tobytes() == history.data[0].tobytes()


class Level(enum.IntEnum):
    LOW = 1


class Kind(str, enum.Enum):
    A = 'a'


Pair = namedtuple('Pair', 'x y')


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_('x'), 'x'),
        (np.array([1, 'a', None], dtype=object), [1, 'a', None]),
        (Level.LOW, 1),
        (Kind.A, 'a'),
        (Path('a/b'), 'a/b'),
        (Pair(1, np.int8(2)), (1, 2)),
        (frozenset({1, 2}), {1, 2}),
        ({np.int64(1), 2}, {1, 2}),
        (defaultdict(list, a=[np.float64(1)]), {'a': [1.0]}),
        (ConfigDict(a=ConfigDict(b=1)), {'a': {'b': 1}}),
        ({np.int64(5): 1}, {5: 1}),
    ],
    ids=repr,
)
def test_other_types_become_plain(value: Any, expected: Any) -> None:
    got = there_and_back(value)
    assert got == expected
    assert type(got) is type(expected)


PLAIN_VALUES = [
    None,
    *(True, 3, 2**70, 0.1, 1j, 'x', b'\x00\xff', bytearray(b'a')),
    *((1, 2), [1, [2]], {3}, {'a': {'b': ()}}, OrderedDict(b=1, a=2), Counter('aab')),
    *(torch.float16, torch.device('cpu'), torch.Size([1, 2])),
]


@pytest.mark.parametrize('value', PLAIN_VALUES, ids=repr)
def test_plain_values_are_passed_on(value: Any) -> None:
    left: list[str] = []
    assert to_plain(value, left) is value
    assert from_plain(value) is value
    assert left == []
    assert through_disk(value) == value


def test_weights_are_passed_on() -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    assert to_plain(state, []) is state, 'a copy would lose the versions in _metadata'
    assert from_plain(state) is state
    parameter = torch.nn.Parameter(torch.ones(2))
    assert to_plain(parameter, []) is parameter


def test_order_and_input_are_kept() -> None:
    value = OrderedDict(z=np.ones(2), a=[1, {'k': np.zeros(1)}])
    got = there_and_back(value)
    assert type(got) is OrderedDict
    assert list(got) == ['z', 'a']
    assert isinstance(value['z'], np.ndarray)
    assert isinstance(value['a'][1]['k'], np.ndarray)


def test_what_has_no_plain_form_is_kept_and_named() -> None:
    left: list[str] = []
    value = {'a': [1, len], 'b': np.zeros(1, dtype=[('x', 'f4')])}
    plain = to_plain(value, left)
    assert plain['a'][1] is len
    assert left == ['builtins.builtin_function_or_method', 'numpy.ndarray']


BYTES = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ({TAG: 'ndarray', 'dtype': '<f8', 'shape': [2]}, 'damaged.*ndarray.*data'),
        ({TAG: 'ndarray', 'dtype': '<f8', 'shape': [2], 'data': BYTES}, 'damaged'),
        (
            {TAG: 'ndarray', 'dtype': '|O', 'shape': [1], 'data': BYTES},
            'not one of numbers',
        ),
        ({TAG: 'ndarray', 'dtype': '<f8', 'shape': [1], 'data': [1.0]}, 'damaged'),
        ({TAG: 'HistoryBuffer', 'max_length': 3}, 'damaged.*HistoryBuffer'),
        ({TAG: 'function', 'name': 'getattr'}, "stands for 'function'.*newer"),
    ],
)
def test_damaged_entries(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain({'a': value})


def test_counts_must_match_values() -> None:
    plain = to_plain(HistoryBuffer([1.0, 2.0], [1, 1]), [])
    plain['counts'] = to_plain(np.ones(3, dtype=int), [])
    with pytest.raises(ValueError, match='not as many counts as values'):
        from_plain(plain)
