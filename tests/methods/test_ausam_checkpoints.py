"""AUSAM's checkpoints: exact resume of history and draws, and those of other wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper

from tests.checkpoints import through_disk
from tests.toys import batches, make, same_state
from tests.wrappers import build, momentum_sgd

both = pytest.mark.parametrize('name', ['ausam', 'ausam-reweight'])


def history_of(wrapper: Any) -> dict[str, dict[str, list[Any]]]:
    """All of it, the last step's visits included."""
    wrapper.exchange_history()
    data_sets = wrapper.history.state_dict()['data_sets']
    return {name: {field: column.tolist() for field, column in fields.items()} for name, fields in data_sets.items()}


def train(model: Any, wrapper: Any, data: list[Any]) -> list[tuple[list[int], list[float]]]:
    """The draws of the steps: rows and probabilities. After its first step the training seeds torch anew."""
    draws = []
    for batch in data:
        model.train_step(batch, wrapper)
        draws.append((wrapper._draw.chosen.tolist(), wrapper._draw.pi.tolist()))
        if wrapper.steps == 1:
            torch.manual_seed(5)  # the draws have a seed of their own
    return draws


@both
@pytest.mark.parametrize('stop', [0, 1, 6])
def test_stopped_and_resumed_draws_as_if_never_stopped(name: str, stop: int) -> None:
    data = (batches(2) * 5)[:10]  # the same samples again and again, so that the history matters
    straight, stopped, resumed = (make(dropout=0.3) for _ in range(3))
    torch.manual_seed(11)
    whole = build(name, straight)
    expected = train(straight, whole, data)

    torch.manual_seed(11)
    first = build(name, stopped)
    draws = train(stopped, first, data[:stop])
    saved = through_disk({'optimizer': first.state_dict(), 'model': stopped.state_dict()})

    torch.manual_seed(99)
    second = build(name, resumed)
    resumed.load_state_dict(saved['model'])
    second.load_state_dict(saved['optimizer'])
    draws += train(resumed, second, data[stop:])
    assert draws == expected
    assert len({tuple(rows) for rows, _ in draws}) > 5
    assert history_of(second) == history_of(whole)
    assert same_state(resumed, straight)


@both
def test_a_checkpoint_without_a_history_loads_with_a_warning(name: str, loading_log: list[str]) -> None:
    model = make()
    before = OptimWrapper(momentum_sgd(model))
    model.train_step(batches(1)[0], before)
    wrapper = build(name, model)
    train(model, wrapper, batches(2))  # what it has gathered, or is about to, belongs to another training
    wrapper.load_state_dict(through_disk(before.state_dict()))
    wrapper.exchange_history()
    assert ['holds no state of mm_sharp' in message for message in loading_log] == [True]
    assert len(wrapper.history) == 0
    assert wrapper.steps == 0
    ((_, pi),) = train(model, wrapper, batches(1))
    assert pi == [5 / 8] * 8
