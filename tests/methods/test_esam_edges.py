"""ESAM where there is little to choose from, where a loss is odd, and where an argument or a model is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

import mm_sharp.methods.esam
from mm_sharp import ESAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.per_sample_loss import PerSampleLossError
from mm_sharp.samples.keys import SampleIdError
from tests.esam_pairs import LineNet, Rows, both, line, pair, pool_batches, selecting, train_both
from tests.toys import Batch, Functional, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import momentum_sgd


# ------------------------------------------------------------------ little to choose from
@both
@pytest.mark.parametrize(
    ('size', 'options'),
    [(1, {}), (1, {'gamma': 0.01}), (2, {}), (8, {'gamma': 1e-9}), (8, {'gamma': 0.01}), (8, {'beta': 0.02})],
    ids=str,
)
def test_one_sample_or_one_tensor_is_left(refresh: int | None, size: int, options: dict[str, float]) -> None:
    ours, wrapper, reference = pair(refresh=refresh, **options)
    train_both(ours, wrapper, reference, pool_batches(12, size, pool=12))
    assert all(p.isfinite().all() for p in ours.parameters())
    assert {len(rows) for rows in reference.rows} == {math.ceil(options.get('gamma', 0.5) * size)}


@both
def test_batches_of_different_sizes(refresh: int | None) -> None:
    sizes = [1, 8, 8, 8, 8, 3, 1, 8, 2, 1, 8]
    train_both(*pair(refresh=refresh), [batch for size in sizes for batch in pool_batches(1, size)])


@both
def test_every_forward_starts_from_the_state_before_the_first(refresh: int | None) -> None:
    """Of the forwards that select and of the second pass nothing is left after the step."""
    model = make()
    counts: list[int] = []
    model.register_forward_pre_hook(lambda *_: counts.append(model.norm.num_batches_tracked.item()))
    wrapper = ESAMOptimWrapper(momentum_sgd(model), **selecting(refresh))
    for batch in batches(2):
        model.train_step(batch, wrapper)
    assert counts == ([0, 0, 0, 1, 1] if refresh else [0, 0, 0, 1, 1, 1])
    assert model.norm.num_batches_tracked == 2


class Unused(ToyNet):
    """Has a parameter that its loss does not depend on, first of all."""

    def __init__(self, with_cp: bool = False) -> None:
        super().__init__(with_cp=with_cp)
        self.unused = nn.Parameter(torch.ones(3))


@pytest.fixture
def unused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask is that of the first tensor."""
    monkeypatch.setattr(
        mm_sharp.methods.esam, 'weight_mask', lambda count, beta, generator: [True] + [False] * (count - 1)
    )


@both
@pytest.mark.usefixtures('unused_alone')
@pytest.mark.parametrize('with_cp', [False, True], ids=['plain', 'checkpointed'])
def test_a_mask_of_a_tensor_that_the_loss_does_not_depend_on(refresh: int | None, with_cp: bool) -> None:
    """Nothing is perturbed, and the step is the base optimizer's on the selected samples."""
    model, twin = make(Unused, with_cp=with_cp), make(Unused, with_cp=with_cp)
    assert next(model.parameters()) is model.unused
    wrapper = ESAMOptimWrapper(momentum_sgd(model), **selecting(refresh))
    rows, optimizer = Rows(model), momentum_sgd(twin)
    for batch in batches(4):
        model.train_step(batch, wrapper)
        assert wrapper.last_step.grad_norm.item() == 0.0
        assert all(p.requires_grad for p in model.parameters())
        twin.parse_losses(twin(**batch))[0].backward()  # checkpointed, this too writes to the buffers
        optimizer.zero_grad()
        buffers = [buffer.clone() for buffer in twin.buffers()]
        chosen = torch.tensor(rows.ids[-1]) - batch['sample_idx'][0]
        assert len(chosen) == 4
        twin.parse_losses(twin(**{name: value[chosen] for name, value in batch.items()}))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for buffer, kept in zip(twin.buffers(), buffers, strict=True):
                buffer.copy_(kept)
        assert same_state(model, twin)


@pytest.mark.usefixtures('unused_alone')
def test_without_a_perturbation_there_is_no_difference_to_remember() -> None:
    model = make(Unused)
    wrapper = ESAMOptimWrapper(momentum_sgd(model), selection='history')
    model.train_step(batches(1)[0], wrapper)
    wrapper.pending_updates.flush()
    assert len(wrapper.history) == 0


# ------------------------------------------------------------------ odd losses
@both
def test_a_loss_that_is_nan_after_the_climb_is_not_selected(refresh: int | None) -> None:
    model = LineNet(log=True)
    rows = Rows(model)
    batch = line([1.0, 2, 100, 3, 0, 1, 5, 2])  # 1 - 0.05 * 100 has no logarithm
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.01), beta=1.0, gamma=0.8, **selecting(refresh))
    model.train_step(batch, wrapper)
    assert rows.ids[1] == [0, 1, 3, 4, 5, 6, 7]
    assert model.weight.isfinite()
    wrapper.pending_updates.flush()
    assert len(wrapper.history) == (7 if refresh else 0)
    assert math.isfinite(wrapper.last_step.metrics()['mean_difference'])


@both
def test_a_loss_that_is_nan_before_the_climb(refresh: int | None) -> None:
    """The gradient is then not finite: no perturbation, no differences, and the first K samples train."""
    model = make()
    rows, start = Rows(model), make()
    wrapper = ESAMOptimWrapper(momentum_sgd(model), **selecting(refresh))
    (batch,) = batches(1)
    batch['targets'][6] = math.nan
    model.train_step(batch, wrapper)
    assert rows.ids[1] == [0, 1, 2, 3]
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_bits(model.head.weight, start.head.weight)
    wrapper.pending_updates.flush()
    assert len(wrapper.history) == 0
    assert wrapper.last_step.metrics() == {}


# ------------------------------------------------------------------ weight_mask
@pytest.mark.parametrize(('count', 'beta'), [(1, 0.3), (3, 0.1), (6, 0.6), (20, 0.6), (40, 0.01)])
def test_each_tensor_is_taken_with_probability_beta_and_one_at_least(count: int, beta: float) -> None:
    generator, draws = torch.Generator().manual_seed(0), 20_000
    taken = torch.tensor([weight_mask(count, beta, generator) for _ in range(draws)], dtype=torch.float64)
    assert taken.sum(1).min() >= 1
    # With no tensor drawn, which happens once in so many, each is as likely as the others.
    expected = beta + (1 - beta) ** count / count
    error = (expected * (1 - expected) / draws) ** 0.5
    assert ((taken.mean(0) - expected).abs() <= 4 * error).all()
    if count > 1:
        together = (taken[:, 0] * taken[:, 1]).mean().item()
        assert abs(together - beta**2) <= 4 * (beta**2 * (1 - beta**2) / draws) ** 0.5, 'not independent'


@given(st.integers(1, 50), st.floats(0, 1, exclude_min=True), st.integers(0, 2**60))
def test_the_same_generator_draws_the_same_mask(count: int, beta: float, seed: int) -> None:
    first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
    mask = weight_mask(count, beta, first)
    assert mask == weight_mask(count, beta, second)
    # What comes after does not depend on the outcome either.
    assert torch.equal(first.get_state(), second.get_state())
    other = torch.Generator().manual_seed(seed)
    assert weight_mask(count, 1.0, other) == [True] * count
    assert torch.equal(first.get_state(), other.get_state())
    assert len(mask) == count
    assert any(mask)
    assert all(type(taken) is bool for taken in mask)


# ------------------------------------------------------------------ arguments
BAD: list[tuple[str, Any, str]] = [
    *(('beta', value, '0.6') for value in (0, -0.1, 1.1, math.nan, '0.5', None, True)),
    *(('gamma', value, '0.5') for value in (0, -0.1, 1.1, math.nan, '0.5', None, True)),
    *(('selection', value, "'exact'") for value in ('Exact', None, 'random')),
    *(('refresh', value, '10') for value in (0, -1, 2.5, True, '10')),
]


@pytest.mark.parametrize(('argument', 'value', 'example'), BAD, ids=[f'{n}={v!r}' for n, v, _ in BAD])
def test_a_bad_value_is_refused(argument: str, value: Any, example: str) -> None:
    with pytest.raises(ValueError) as caught:
        ESAMOptimWrapper(momentum_sgd(make()), **{argument: value})
    message = str(caught.value)
    assert message.startswith(f'ESAMOptimWrapper: {argument}={value!r} is not allowed')
    assert f"optim_wrapper = dict(type='ESAMOptimWrapper', {argument}={example}, ...)" in message


@given(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), st.integers(1, 2**31 - 1))
def test_every_value_in_range_is_accepted(beta: float, gamma: float, refresh: int) -> None:
    wrapper = ESAMOptimWrapper(momentum_sgd(make()), beta=beta, gamma=gamma, refresh=refresh, selection='history')
    assert (wrapper.beta, wrapper.gamma, wrapper.refresh, wrapper.selection) == (beta, gamma, refresh, 'history')


# ------------------------------------------------------------------ models and batches that are refused
@both
def test_a_loss_without_a_form_for_samples_is_refused_at_the_first_step(refresh: int | None) -> None:
    model, start = make(Functional), make(Functional)
    wrapper = ESAMOptimWrapper(momentum_sgd(model), **selecting(refresh))
    with pytest.raises(PerSampleLossError, match=r"Functional(.|\n)*dict\(type='SAMOptimWrapper'"):
        model.train_step(batches(1)[0], wrapper)
    assert same_state(model, start)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert wrapper.inner_count == wrapper.steps == 0


def test_samples_without_an_id() -> None:
    model, start = make(), make()
    (batch,) = batches(1)
    del batch['sample_idx']
    with pytest.raises(SampleIdError, match=r"ESAMOptimWrapper(.|\n)*type='IndexedDataset'"):
        model.train_step(batch, ESAMOptimWrapper(momentum_sgd(model), selection='history'))
    assert same_state(model, start)
    assert all(p.requires_grad for p in model.parameters())
    # The exact selection needs none.
    wrapper = ESAMOptimWrapper(momentum_sgd(model))
    model.train_step(batch, wrapper)
    assert not same_state(model, start)
    assert len(wrapper.history) == 0


# ------------------------------------------------------------------ figures for the log
VALUES = [1.0, 3, -1, 2, 4, 1, 3, 0]  # the increases are 0.05 of these; the middle between -1 and 4 is 1.5


def entropy(sizes: list[float]) -> float:
    shares = [size / sum(sizes) for size in sizes if size]
    return -sum(share * math.log(share) for share in shares) / math.log(len(sizes))


def test_figures_of_the_exact_selection() -> None:
    model = LineNet()
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.0), rho=0.05, beta=1.0)
    model.train_step(line(VALUES), wrapper)
    assert wrapper.last_step.metrics() == {
        'mean_difference': pytest.approx(0.05 * 13 / 8),
        'sampling_entropy': pytest.approx(entropy([1, 3, 1, 2, 4, 1, 3, 0])),
        'large_scores': 4 / 8,
    }
    assert wrapper.last_step.perturbed_loss.item() == pytest.approx(0.05 * 13 / 8)  # of the whole batch
    assert wrapper.log_scalars() == {}


def test_figures_of_the_history() -> None:
    """Of averages, which are absolute, and of the samples that have one."""
    model = LineNet()
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.0), rho=0.05, beta=1.0, gamma=0.3, selection='history')
    wrapper.dataset_size = 16
    model.train_step(line(VALUES), wrapper)
    assert wrapper.last_step.metrics()['mean_difference'] == pytest.approx(0.05 * 13 / 8)
    model.train_step(line(VALUES, first_id=3), wrapper)  # 2, 4, 1, 3 and 0 were measured of the first five
    assert wrapper.last_step.metrics() == {
        'mean_difference': pytest.approx(0.05 * 10 / 5),
        'sampling_entropy': pytest.approx(entropy([2, 4, 1, 3, 0])),
        'large_scores': 2 / 5,
    }
    assert wrapper.last_step.perturbed_loss.item() != pytest.approx(0.05 * 13 / 8)  # of the selected samples
    assert wrapper.log_scalars() == {'share_seen': 0.5}
    model.train_step(line(VALUES, first_id=100), wrapper)  # none was measured
    assert wrapper.last_step.metrics() == {}


@pytest.mark.parametrize('batch', [line(VALUES), line([1.0])], ids=['gamma = 1', 'one sample'])
def test_without_a_selection_there_are_no_figures(batch: Batch) -> None:
    model = LineNet()
    gamma = 1.0 if len(batch['inputs']) > 1 else 0.5
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.0), beta=1.0, gamma=gamma)
    model.train_step(batch, wrapper)
    assert wrapper.last_step.metrics is None
    assert wrapper.last_step.perturbed_loss.item() == pytest.approx(0.05 * batch['inputs'].mean().item())


# ------------------------------------------------------------------ lazy modules
class Lazy(ToyNet):
    """Its layers get their shapes in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(3)


@both
@pytest.mark.parametrize('options', [{'beta': 0.3}, {'beta': 0.3, 'gamma': 1.0}], ids=['esam', 'all samples'])
def test_lazy_modules_train_as_if_they_had_been_initialised(refresh: int | None, options: dict[str, float]) -> None:
    models = []
    for early in (False, True):
        torch.manual_seed(0)
        model = Lazy().train()
        if early:
            for module, inputs in ((model.conv, (1, 2, 6, 6)), (model.norm, (1, 6, 4, 4)), (model.head, (1, 96))):
                module.eval()(torch.zeros(inputs))
                module.train()
        wrapper = ESAMOptimWrapper(momentum_sgd(model), **selecting(refresh), **options)
        for batch in batches(3):
            model.train_step(batch, wrapper)
        models.append(model)
    assert same_state(*models)
    assert all(parameter.requires_grad for parameter in models[0].parameters())
