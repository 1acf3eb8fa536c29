"""Whether tensors are finite, found in a hurry: never True where one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mm_sharp.ops.finite import all_finite, quickly_finite

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    'small': lambda: torch.ones(3, 4),
    'large': lambda: torch.ones(50, 60),
    'small, strided': lambda: torch.ones(4, 8)[:, ::2],
    'large, transposed': lambda: torch.ones(50, 60).t(),
}


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('kinds', [[name] for name in LAYOUTS] + [['small', 'large'], [*LAYOUTS]], ids='+'.join)
def test_one_element_of_any_tensor_is_found(kinds: list[str], bad: float) -> None:
    tensors = [LAYOUTS[kind]() for kind in kinds]
    assert quickly_finite(tensors)
    assert all_finite(tensors)
    for tensor in tensors:
        tensor[1, 2] = bad
        assert not quickly_finite(tensors)
        assert not all_finite(tensors)
        tensor[1, 2] = 1.0


@pytest.mark.parametrize('size', [4, 4000])
def test_what_overflows_on_the_way_is_looked_at_again(size: int) -> None:
    """A sum of squares is not finite long before an element is."""
    tensors = [torch.full((size,), 1e30)]
    assert not quickly_finite(tensors)
    assert all_finite(tensors)


def test_both_infinities_do_not_cancel() -> None:
    assert not quickly_finite([torch.tensor([float('inf'), float('-inf')])])


@pytest.mark.parametrize(
    'odd', [torch.ones(3, dtype=torch.float64), torch.eye(3).to_sparse(), torch.ones(0)], ids=['dtype', 'sparse', '']
)
def test_of_unlike_tensors_it_does_not_know(odd: Tensor) -> None:
    assert not quickly_finite([torch.ones(3), odd])
    assert all_finite([torch.ones(3), odd])


def test_nothing_is_finite() -> None:
    assert quickly_finite([])
    assert all_finite([])
