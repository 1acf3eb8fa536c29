"""Mixed precision on the CPU: float16 with loss scaling, bfloat16 without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.references import sam_perturbation
from tests.toys import Batch, NaNSecond, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import DISTINCT, DISTINCT_TWO_PASS, TWO_PASS, WRAPPERS, build, momentum_sgd, same_weights

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
everywhere = pytest.mark.parametrize('name', WRAPPERS)
distinct = pytest.mark.parametrize('name', DISTINCT)
two_passes = pytest.mark.parametrize('name', TWO_PASS)
distinct_two_passes = pytest.mark.parametrize('name', DISTINCT_TWO_PASS)


def amp_step(model: ToyNet, batch: Batch, dtype: torch.dtype, scale: float, rho: float) -> list[Tensor]:
    """The SAM gradient under autocast and a fixed loss scale, written out by hand."""
    parameters = list(model.parameters())

    def gradients() -> list[Tensor]:
        with torch.autocast('cpu', dtype=dtype):
            losses = model(**batch)
        loss = model.parse_losses(losses)[0]
        return [g / scale for g in torch.autograd.grad(loss * scale, parameters)]

    weights = [p.detach().clone() for p in parameters]
    for parameter, step in zip(parameters, sam_perturbation(gradients(), rho), strict=True):
        parameter.data.add_(step)
    final = gradients()
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return final


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1e3)], ids=['free', 'clipped'])
def test_equal_to_the_reference(dtype: str, clip_grad: Any) -> None:
    """Clipping at a norm that is never reached unscales the gradients, and must do so once."""
    ours, theirs = make(), make()
    wrapper = build('sam', ours, loss_scale=256.0, dtype=dtype, clip_grad=clip_grad)
    optimizer = momentum_sgd(theirs)
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        gradients = amp_step(theirs, batch, DTYPES[dtype], 256.0 if dtype == 'float16' else 1.0, 0.05)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@two_passes
@pytest.mark.parametrize('dtype', DTYPES)
def test_both_passes_run_under_autocast(name: str, dtype: str) -> None:
    model = make()
    seen: list[torch.dtype] = []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.train_step(batches(1)[0], build(name, model, dtype=dtype))
    assert len(seen) in (2, 3)
    assert set(seen) == {DTYPES[dtype]}


def test_a_scaler_that_is_not_enabled_is_none() -> None:
    """A gradient that is not finite is then looked for as without mixed precision."""
    models = make(NaNSecond, factors={3: float('nan')}), make(NaNSecond, factors={3: float('nan')})
    first, second = batches(2)
    for model, loss_scale in zip(models, ({'enabled': False}, 1.0), strict=True):
        wrapper = build('sam', model, dtype='float16', loss_scale=loss_scale)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        model.train_step(first, wrapper)
        after = [parameter.detach().clone() for parameter in model.parameters()]
        assert not any(map(torch.equal, after, start))
        model.train_step(second, wrapper)
        assert all(map(torch.equal, model.parameters(), after))
    assert same_weights('sam', *models)


def test_bfloat16_has_no_scaler() -> None:
    wrapper = build('sam', make(), dtype='bfloat16')
    assert wrapper.precision.scaler is None
    assert 'loss_scaler' not in wrapper.state_dict()


@distinct_two_passes
@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_overflow_of_the_first_pass_alone(name: str, accumulative_counts: int) -> None:
    """No perturbation, no NaN, and the optimizer steps, since the final gradient is finite."""
    model = make(NaNSecond, factors={0: float('inf')})
    wrapper = build(
        name, model, dtype='float16', loss_scale=dict(init_scale=64.0), accumulative_counts=accumulative_counts
    )
    before = make(NaNSecond, factors={})
    scale = wrapper.precision.scaler.get_scale()
    for batch in batches(accumulative_counts):
        model.train_step(batch, wrapper)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_state(model, before)
    assert wrapper.precision.scaler.get_scale() == scale


@two_passes
def test_overflow_of_the_second_pass_is_the_scalers(name: str) -> None:
    """The step is skipped and the scale halved, as for any overflow."""
    model = make(NaNSecond, factors={1: float('inf')})
    wrapper = build(name, model, dtype='float16')
    before = [p.detach().clone() for p in model.parameters()]
    scale = wrapper.precision.scaler.get_scale()
    first, second = batches(2)
    model.train_step(first, wrapper)
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert wrapper.precision.scaler.get_scale() == scale / 2
    model.train_step(second, wrapper)
    assert not all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@distinct
def test_a_scale_that_overflows_every_gradient(name: str) -> None:
    """Loss scale 2^40 overflows both passes until the scaler has halved it often enough; weights stay finite."""
    model = make()
    wrapper = build(name, model, dtype='float16', loss_scale=dict(init_scale=2.0**60, backoff_factor=2.0**-10))
    before = make()
    (batch,) = batches(1)
    steps = 0
    while same_bits(model.conv.weight, before.conv.weight) and steps < 10:
        model.train_step(batch, wrapper)
        assert all(p.isfinite().all() for p in model.parameters())
        steps += 1
    assert 1 < steps < 10


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=() if n in ('sam', 'gsam', 'ausam') else pytest.mark.slow) for n in DISTINCT_TWO_PASS],
)
@pytest.mark.parametrize('accumulative_counts', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_dynamic_scale_under_accumulation_still_perturbs(name: str, accumulative_counts: int) -> None:
    """The scale grows to what the second pass bears, whose loss is divided: the first pass must bear it, too."""
    model = make()
    growth = dict(init_scale=2.0**18, growth_interval=1, growth_factor=1.2)
    wrapper = build(name, model, dtype='float16', loss_scale=growth, accumulative_counts=accumulative_counts)
    norms = []
    for batch in batches(80):
        model.train_step(batch, wrapper)
        if wrapper.last_step.grad_norm is not None:  # LookSAM has none in the steps between
            norms.append(wrapper.last_step.grad_norm.item())
    # At this growth the scale is at its limit for most of the last steps, and over it in some.
    finite = [math.isfinite(norm) for norm in norms]
    early, late = finite[: len(finite) // 2], finite[len(finite) // 2 :]
    assert not all(early)
    assert sum(late) >= len(late) / 2
    if getattr(wrapper, 'uses_history', False):
        wrapper.pending_updates.flush()
        assert len(wrapper.history) > 0


@distinct_two_passes
@pytest.mark.parametrize('accumulative_counts', [1, 3])
def test_the_recorded_norm_is_that_of_the_whole_loss_under_accumulation(name: str, accumulative_counts: int) -> None:
    norms = []
    for dtype in ('float16', None):
        model = make()
        wrapper = build(name, model, dtype=dtype, loss_scale=8.0, accumulative_counts=accumulative_counts)
        model.train_step(batches(1)[0], wrapper)
        if wrapper.last_step.grad_norm is not None:  # LookSAM has none in the steps between
            norms.append(wrapper.last_step.grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@distinct_two_passes
def test_the_recorded_norm_is_without_loss_scale(name: str) -> None:
    norms = []
    for dtype, loss_scale in (('float16', 2.0**12), (None, 1.0)):
        model = make()
        wrapper = build(name, model, dtype=dtype, loss_scale=loss_scale)
        model.train_step(batches(1)[0], wrapper)
        if wrapper.last_step.grad_norm is not None:  # LookSAM has none in the steps between
            norms.append(wrapper.last_step.grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_a_fixed_scale_stays() -> None:
    model = make()
    wrapper = build('sam', model, dtype='float16', loss_scale=64)
    for batch in batches(3):
        model.train_step(batch, wrapper)
    assert wrapper.precision.scaler.get_scale() == 64.0


@distinct
@pytest.mark.parametrize('dtype', DTYPES)
def test_an_enclosing_autocast_region_keeps_no_stale_casts(name: str, dtype: str) -> None:
    """Autocast caches the casts of weights until the outermost region ends: the passes must not share them."""
    inside, outside = make(), make()
    wrappers = build(name, inside, dtype=dtype), build(name, outside, dtype=dtype)
    for batch in batches(3):
        with torch.autocast('cpu', dtype=DTYPES[dtype]):
            with wrappers[0].optim_context(inside):
                losses = inside(**batch)
            wrappers[0].update_params(inside.parse_losses(losses)[0])
        outside.train_step(batch, wrappers[1])
    assert same_state(inside, outside)


@everywhere
def test_rho_zero_under_amp_is_the_base_optimizer_under_amp(name: str) -> None:
    ours, theirs = make(), make()
    wrapper = build(name, ours, momentum_sgd(ours, 0.1), whole=True, rho=0.0, dtype='float16')
    scaler, optimizer = torch.amp.GradScaler('cpu'), momentum_sgd(theirs, 0.1)
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        with torch.autocast('cpu', dtype=torch.float16):
            losses = theirs(**batch)
        scaler.scale(theirs.parse_losses(losses)[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert same_weights(name, ours, theirs, tolerance=1e-3)
