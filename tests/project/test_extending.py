"""The example of docs/extending.md is a method that works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from mm_sharp import SAMOptimWrapper
from tests.conftest import ROOT
from tests.toys import batches, make, same_state
from tests.wrappers import momentum_sgd


@pytest.fixture
def example() -> Iterator[Any]:
    """The page's class, registered for one test."""
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/extending.md').read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    yield names['IntervalSAMOptimWrapper']
    OPTIM_WRAPPERS.module_dict.pop('IntervalSAMOptimWrapper')


@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_one_step_of_three_is_sam_s_and_the_others_are_the_base_optimizer_s(
    example: Any, accumulative_counts: int
) -> None:
    ours, theirs = make(), make()
    wrapper = OPTIM_WRAPPERS.build(
        dict(
            type='IntervalSAMOptimWrapper',
            interval=3,
            optimizer=momentum_sgd(ours),
            accumulative_counts=accumulative_counts,
        )
    )
    optimizer = momentum_sgd(theirs)
    sam = SAMOptimWrapper(optimizer, accumulative_counts=accumulative_counts)
    base = OptimWrapper(optimizer, accumulative_counts=accumulative_counts)
    for number, batch in enumerate(batches(7 * accumulative_counts)):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, sam if (number // accumulative_counts) % 3 == 0 else base)
        assert same_state(ours, theirs)
    assert example.theoretical_cost(8, interval=3).cycle == pytest.approx(4 / 3)


def test_it_is_about_as_long_as_the_page_says(example: Any) -> None:
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/extending.md').read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    with pytest.raises(ValueError, match='interval=0 is not allowed'):
        example(momentum_sgd(make()), interval=0)
