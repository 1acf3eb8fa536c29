"""ESAM equals a hand-written reference given the same random draws, bit for bit on the CPU; what it selects."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from mm_sharp import ESAMOptimWrapper
from tests.esam_pairs import (
    LineNet,
    Rows,
    both,
    draws,
    line,
    pair,
    pool_batches,
    selecting,
    toy,
    train_both,
)
from tests.references_esam import ToyLoss
from tests.toys import Batch, batches, make, same_state
from tests.wrappers import momentum_sgd


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
@pytest.mark.parametrize(('gamma', 'beta'), [(0.3, 0.6), (0.5, 0.2), (0.5, 1.0), (1.0, 0.6)])
def test_fifty_steps_equal_the_reference_bit_for_bit(refresh: int | None, gamma: float, beta: float) -> None:
    ours, wrapper, reference = pair(refresh=refresh, gamma=gamma, beta=beta)
    train_both(ours, wrapper, reference, pool_batches(50))
    assert ours.norm.num_batches_tracked.item() == wrapper.steps == 50
    assert not same_state(ours, toy())


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
def test_with_asam_too(refresh: int | None) -> None:
    train_both(*pair(refresh=refresh, adaptive=True, rho=0.5), pool_batches(50))


@pytest.mark.parametrize('adaptive', ['tensor', 'layer', 'global'])
def test_relative_to_the_weights_too(adaptive: str) -> None:
    """Of the tensors drawn, and times 1 / beta."""
    train_both(*pair(adaptive=adaptive, rho=0.02), pool_batches(10))


@pytest.mark.parametrize('refresh', [None, 10], ids=['exact', 'history'])
@pytest.mark.parametrize(
    'loss', [ToyLoss(True, True), ToyLoss(True, False), ToyLoss(False, True)], ids=['sum', 'sum + mean', 'mean + sum']
)
def test_a_summed_loss_is_scaled_by_n_over_k(refresh: int | None, loss: ToyLoss) -> None:
    train_both(*pair(loss, lr=0.002, refresh=refresh, gamma=0.3), pool_batches(50))


def test_the_history_equals_the_references() -> None:
    ours, wrapper, reference = pair(refresh=10)
    train_both(ours, wrapper, reference, pool_batches(50))
    wrapper.pending_updates.flush()
    ids = sorted(reference.history)
    assert sum(visits for _, visits in reference.history.values()) == 5 * 8
    assert max(visits for _, visits in reference.history.values()) > 1
    assert len(wrapper.history) == len(ids)
    scores = wrapper.history.scores([('', i) for i in ids])
    assert scores == pytest.approx([reference.history[i][0] for i in ids], rel=1e-6)
    # Selections were made by batches that were measured in part, and by such that were measured as a whole.
    unmeasured = [scores.count(None) for step, scores in enumerate(reference.scores) if step % 10]
    assert 0 in unmeasured
    assert any(0 < count < 8 for count in unmeasured)


def test_both_selections_and_every_option_differ() -> None:
    """The comparisons above could not fail if an option had no effect."""
    ends = []
    for options in ({}, {'refresh': 10}, {'refresh': 1}, {'gamma': 0.3}, {'beta': 0.9}, {'adaptive': True}):
        ours, wrapper, _ = pair(**options)
        for batch in pool_batches(12):
            ours.train_step(batch, wrapper)
        ends.append(ours)
    exact, history, measured_always, *others = ends
    # Measured in every step, the history decides nothing.
    assert same_state(exact, measured_always)
    assert not any(same_state(exact, other) for other in (history, *others))


@pytest.mark.parametrize('refresh', [None, 2], ids=['exact', 'history'])
def test_accumulation_draws_and_selects_anew_for_every_micro_batch(refresh: int | None) -> None:
    ours, _, reference = pair(refresh=refresh)
    wrapper = ESAMOptimWrapper(momentum_sgd(ours, 0.01), accumulative_counts=3, **selecting(refresh))
    data = pool_batches(3)
    for batch in data:
        ours.train_step(batch, wrapper)
    final = [reference.gradients(batch, *draws(wrapper, ours, step, 8)) for step, batch in enumerate(data)]
    for parameter, *parts in zip(reference.model.parameters(), *final, strict=True):
        parameter.grad = sum(parts) / 3
    reference.optimizer.step()
    for left, right in zip(ours.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------ selection
def test_the_samples_with_the_largest_increase_are_kept() -> None:
    """By brute force: every sample's loss by itself, at the weights that each pass saw."""
    model = make()
    twin, rows = deepcopy(model), Rows(model)
    weights: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, _: weights.append(deepcopy(module.state_dict())))
    wrapper = ESAMOptimWrapper(momentum_sgd(model), gamma=0.3)

    def losses(state: dict[str, Tensor], batch: Batch) -> list[float]:
        twin.load_state_dict(state)
        outputs = twin(**batch, mode='tensor').detach()
        pairs = [(outputs[i : i + 1], batch['targets'][i : i + 1]) for i in range(len(outputs))]
        return [(twin.square_loss(output, target) + twin.size_loss(output)).item() for output, target in pairs]

    for step, batch in enumerate(batches(10)):
        model.train_step(batch, wrapper)
        before, after = (losses(state, batch) for state in weights[3 * step : 3 * step + 2])
        order = sorted(range(8), key=lambda i: before[i] - after[i])
        assert rows.ids[-1] == batch['sample_idx'][sorted(order[:3])].tolist()
        assert wrapper.last_step.perturbed_loss.item() == pytest.approx(sum(after) / 8, rel=1e-5)


@pytest.mark.parametrize(
    ('gamma', 'kept'), [(0.25, [1, 2]), (0.5, [1, 2, 4, 6]), (0.625, [1, 2, 3, 4, 6]), (0.75, [0, 1, 2, 3, 4, 6])]
)
def test_of_equal_increases_the_first_are_kept_and_none_is_lost(gamma: float, kept: list[int]) -> None:
    """On a model that returns losses of shape (N,): no loss module, no hook."""
    model = LineNet()
    rows = Rows(model)
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=1.0), beta=1.0, gamma=gamma)
    values = [1.0, 3, 3, 2, 3, 1, 3, 0]
    model.train_step(line(values), wrapper)
    assert rows.ids == [list(range(8)), kept]
    assert model.weight.item() == pytest.approx(-sum(values[i] for i in kept) / len(kept))


@both
def test_all_samples_equal(refresh: int | None) -> None:
    model = LineNet()
    rows = Rows(model)
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.1), beta=1.0, **selecting(refresh))
    for _ in range(4):
        model.train_step(line([2.0] * 8), wrapper)
        assert wrapper.last_step.metrics()['sampling_entropy'] == pytest.approx(1.0)
    assert rows.ids[1] == [0, 1, 2, 3]
    assert all(len(set(ids)) == 4 for ids in rows.ids[1::2])
    # Equal histories are taken at random, equal increases in order.
    assert (rows.ids[3] == rows.ids[5] == rows.ids[1]) == (refresh is None)
