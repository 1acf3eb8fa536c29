"""The contracts that every wrapper keeps (DESIGN: restoration, side effects, accumulation, errors, replay)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from tests.toys import CountingNet, NaNSecond, Notes, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import (
    DISTINCT,
    DISTINCT_TWO_PASS,
    ONE_PASS,
    TWO_PASS,
    WRAPPERS,
    build,
    momentum_sgd,
    resting_sgd,
    same_weights,
)

everywhere = pytest.mark.parametrize('name', WRAPPERS)
distinct = pytest.mark.parametrize('name', DISTINCT)
two_passes = pytest.mark.parametrize('name', TWO_PASS)
distinct_two_passes = pytest.mark.parametrize('name', DISTINCT_TWO_PASS)


class Watch:
    """Copies of the weights as each forward pass saw them."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[list[Tensor]] = Notes()
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.seen.append([p.detach().clone() for p in module.parameters()])


# ------------------------------------------------------------------ 1. restoration
@everywhere
def test_weights_are_restored_exactly_before_the_step(name: str) -> None:
    model = make()
    wrapper = build(name, model, resting_sgd(model))
    before = make()
    pointers = [p.data_ptr() for p in model.parameters()]
    watch = Watch(model)
    for batch in batches(5):
        model.train_step(batch, wrapper)
    for left, right in zip(model.parameters(), before.parameters(), strict=True):
        assert same_bits(left, right)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert len(watch.seen) >= (5 if name in ONE_PASS else 8), 'LookSAM has a second pass in three of five steps'
    first, second = watch.seen[:2]
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), 'nothing was perturbed'


class Interrupting(ToyNet):
    """Raises in a forward or backward pass; a forward without gradients (ESAM's selection) has no number."""

    def __init__(self, error: BaseException, where: str) -> None:
        super().__init__()
        self.error, self.where, self.forwards = error, where, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        if torch.is_grad_enabled():
            self.forwards.append(None)
        losses = super().forward(inputs, targets, sample_idx, mode)
        stage = {1: 'first', 2: 'second'}[len(self.forwards)] if torch.is_grad_enabled() else 'selecting'
        if self.where == f'{stage} forward':
            raise self.error
        if self.where == f'{stage} backward':
            losses['loss_size'].register_hook(self.fail)
        return losses

    def fail(self, gradient: Tensor) -> Tensor:
        raise self.error


STAGES = ('first forward', 'first backward', 'selecting forward', 'second forward', 'second backward')
FAULTS = [
    *((name, where, ValueError('broken')) for name in DISTINCT for where in STAGES),
    *((name, 'second forward', KeyboardInterrupt()) for name in WRAPPERS),
]


@pytest.mark.parametrize(
    ('name', 'where', 'error'),
    [
        case
        for case in FAULTS
        if (case[1] != 'selecting forward' or case[0].startswith('esam'))
        and not (case[1].startswith('second') and case[0] in ONE_PASS)
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_exception_anywhere_leaves_everything_as_it_was(name: str, where: str, error: BaseException) -> None:
    model = make(Interrupting, error=error, where=where)
    wrapper = build(name, model, accumulative_counts=4)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    random_state = torch.get_rng_state()
    with pytest.raises(type(error)):
        model.train_step(batches(1)[0], wrapper)
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert wrapper.inner_count == 0
    # The next step works, and is the step of a wrapper that never failed.
    model.where, model.forwards = 'nowhere', []
    other = make(Interrupting, error=error, where='nowhere')
    reference = build(name, other, accumulative_counts=4)
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    model.train_step(batches(1)[0], wrapper)
    other.train_step(batches(1)[0], reference)
    assert same_state(model, other)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


class HalfUsed(ToyNet):
    """Uses one parameter in the first pass only, another in the second only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.forwards: list[None] = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        used = self.second if len(self.forwards) % 2 else self.first
        if torch.is_grad_enabled():
            self.forwards.append(None)
        handle = self.head.register_forward_hook(lambda module, inputs, output: output + used)
        losses = super().forward(inputs, targets, sample_idx, mode)
        handle.remove()
        return losses


@distinct
def test_parameters_without_a_gradient_in_one_pass_are_restored(name: str) -> None:
    model = make(HalfUsed)
    wrapper = build(name, model, resting_sgd(model))
    model.train_step(batches(1)[0], wrapper)
    assert same_bits(model.first, torch.ones(3))
    assert same_bits(model.second, torch.ones(3))


@distinct
def test_a_forward_left_without_its_update_changes_nothing_later(name: str) -> None:
    """Its copies of buffers are dropped, and no parameter is left without a gradient."""
    model = make()
    wrapper = build(name, model)
    with wrapper.optim_context(model):
        model(**batches(1)[0])
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.norm.running_mean.fill_(7.0)
    with pytest.raises(ValueError, match='before the model'), wrapper.optim_context(model):
        raise ValueError('before the model is called')
    assert (model.norm.running_mean == 7.0).all()


# ------------------------------------------------------------------ 2. rho = 0
@everywhere
@pytest.mark.parametrize(('accumulative_counts', 'with_cp'), [(1, True), (3, False)])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(name: str, accumulative_counts: int, with_cp: bool) -> None:
    ours, theirs = make(dropout=0.4, with_cp=with_cp), make(dropout=0.4, with_cp=with_cp)
    kwargs = dict(accumulative_counts=accumulative_counts, clip_grad=dict(max_norm=0.5))
    wrapper = build(name, ours, rho=0.0, whole=True, **kwargs)
    base = OptimWrapper(momentum_sgd(theirs), **{**kwargs, 'clip_grad': dict(max_norm=0.5)})
    for model, optim_wrapper in ((ours, wrapper), (theirs, base)):
        torch.manual_seed(3)
        optim_wrapper.initialize_count_status(model, 0, 7)
        for batch in batches(7):
            model.train_step(batch, optim_wrapper)
    assert same_weights(name, ours, theirs)
    assert wrapper.inner_count == base.inner_count == 7


# ------------------------------------------------------------------ 3. side effects
@two_passes
@pytest.mark.parametrize(('kind', 'accumulative_counts'), [(ToyNet, 2), (CountingNet, 1)])
def test_the_second_pass_leaves_no_trace(name: str, kind: type[ToyNet], accumulative_counts: int) -> None:
    """With a learning rate of 0 only forward passes change anything: as many as the base optimizer runs."""
    ours, theirs = make(kind), make(kind)
    optimizer = resting_sgd(ours)
    wrapper = build(name, ours, optimizer, whole=True, accumulative_counts=accumulative_counts)
    base = OptimWrapper(resting_sgd(theirs), accumulative_counts=accumulative_counts)
    pointers = [b.data_ptr() for b in ours.norm.buffers()]
    for batch in batches(6):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base)
        assert same_state(ours, theirs)
    assert ours.norm.num_batches_tracked.item() == 6
    assert getattr(ours, 'calls', 6) == 6
    assert [b.data_ptr() for b in ours.norm.buffers()] == pointers


@distinct_two_passes
def test_checkpointed_recomputation_in_the_second_backward_leaves_no_trace(name: str) -> None:
    ours, theirs = make(with_cp=True), make(with_cp=True)
    wrapper = build(name, ours, resting_sgd(ours), whole=True)
    base = OptimWrapper(resting_sgd(theirs))
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base)
    assert same_state(ours, theirs)


@distinct_two_passes
def test_batch_norm_uses_batch_statistics_in_the_second_pass(name: str) -> None:
    model = make()
    modes: list[bool] = []
    model.norm.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train_step(batches(1)[0], build(name, model))
    assert modes in ([True] * 2, [True] * 3)


@distinct
def test_the_caller_sees_the_losses_of_the_first_pass(name: str) -> None:
    ours, theirs = make(), make()
    (batch,) = batches(1)
    logged = ours.train_step(batch, build(name, ours, whole=True))
    expected = theirs.train_step(batch, OptimWrapper(momentum_sgd(theirs)))
    assert {k: v.item() for k, v in logged.items()} == {k: pytest.approx(v.item()) for k, v in expected.items()}


# ------------------------------------------------------------------ 4. accumulation
@everywhere
def test_the_inner_count_advances_by_one(name: str) -> None:
    model = make()
    wrapper = build(name, model, accumulative_counts=2)
    watch = Watch(model)
    for count, batch in enumerate(batches(5), start=1):
        before = [p.detach().clone() for p in model.parameters()]
        model.train_step(batch, wrapper)
        assert wrapper.inner_count == count
        stepped = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert stepped == (count % 2 == 0)
    assert len(watch.seen) >= (5 if name in ONE_PASS else 8), 'LookSAM has a second pass in three of five steps'


@everywhere
def test_first_gradients_never_reach_accumulated_ones(name: str) -> None:
    """Accumulated over a cycle of two equal micro-batches, the gradient is that of one (half each)."""
    (batch,) = batches(1)
    one, two = make(norm=False), make(norm=False)
    options = dict(whole=True, accumulative_counts=4, **({'beta': 1.0} if name.startswith('esam') else {}))
    single, double = build(name, one, **options), build(name, two, **options)
    one.train_step(batch, single)
    two.train_step(batch, double)
    first = [p.grad.clone() for p in two.parameters()]
    two.train_step(batch, double)
    for left, middle, right in zip(one.parameters(), first, two.parameters(), strict=True):
        assert same_bits(left.grad, middle)
        torch.testing.assert_close(right.grad, 2 * left.grad)


@distinct
def test_the_last_incomplete_cycle_is_scaled_and_stepped(name: str) -> None:
    """5 iterations in cycles of 3: the last cycle has 2, as MMEngine's OptimWrapper counts."""
    ours, theirs = make(norm=False), make(norm=False)
    wrapper = build(name, ours, rho=0.0, whole=True, accumulative_counts=3)
    base = OptimWrapper(momentum_sgd(theirs), accumulative_counts=3)
    for model, optim_wrapper in ((ours, wrapper), (theirs, base)):
        optim_wrapper.initialize_count_status(model, 0, 5)
        for batch in batches(5):
            model.train_step(batch, optim_wrapper)
    assert same_weights(name, ours, theirs)
    assert all(p.grad is None for p in ours.parameters())


# ------------------------------------------------------------------ 5. non-finite values (AMP: test_amp.py)
@two_passes
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_first_gradient_that_is_not_finite_means_no_perturbation(name: str, bad: float) -> None:
    ours = make(NaNSecond, factors={0: bad})
    watch = Watch(ours)
    wrapper = build(name, ours, whole=True)
    (batch,) = batches(1)
    ours.train_step(batch, wrapper)
    first, second = watch.seen
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    # The second pass, finite and at the unperturbed weights, is then the base optimizer's gradient.
    theirs = make(NaNSecond, factors={})
    theirs.train_step(batch, OptimWrapper(momentum_sgd(theirs)))
    assert same_weights(name, ours, theirs)


# ------------------------------------------------------------------ 9. errors
def test_update_params_without_a_forward() -> None:
    model = make()
    wrapper = build('sam', model)
    loss = model.parse_losses(model(**batches(1)[0]))[0]
    with pytest.raises(RuntimeError, match=r'needs the forward pass(.|\n)*with optim_wrapper.optim_context\(model\)'):
        wrapper.update_params(loss)


def test_update_params_twice_for_one_forward() -> None:
    model = make()
    wrapper = build('sam', model)
    with wrapper.optim_context(model):
        losses = model(**batches(1)[0])
    wrapper.update_params(model.parse_losses(losses)[0])
    with pytest.raises(RuntimeError, match='needs the forward pass'):
        wrapper.update_params(model.parse_losses(losses)[0])


@distinct
def test_a_model_called_twice_in_one_context(name: str) -> None:
    model = make()
    wrapper = build(name, model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    (batch,) = batches(1)

    def call_twice() -> None:
        with wrapper.optim_context(model):
            model(**batch)
            model(**batch)

    with pytest.raises(RuntimeError, match='ToyNet was called twice in one optim_context'):
        call_twice()
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())
    model.train_step(batch, wrapper)


def test_a_loss_that_the_second_pass_could_not_repeat() -> None:
    model = make()
    wrapper = build('sam', model)
    with wrapper.optim_context(model):
        losses = model(**batches(1)[0])
    loss = model.parse_losses(losses)[0]
    with pytest.raises(ValueError, match=r'ToyNet(.|\n)*parse_losses'):
        wrapper.update_params(2 * loss)


def test_an_output_without_a_loss() -> None:
    model = make()
    wrapper = build('sam', model)
    model.forward = lambda inputs, targets, sample_idx, mode='loss': [inputs]  # type: ignore[method-assign]
    with wrapper.optim_context(model):
        model(**batches(1)[0])
    with pytest.raises(TypeError, match='ToyNet returned list'):
        wrapper.update_params(torch.zeros((), requires_grad=True))


def test_the_callers_config_is_not_changed() -> None:
    model = make()
    clip_grad = dict(type='norm', max_norm=1.0)
    perturb: dict[str, object] = dict(norm=False, exclude=['head'])
    build('sam', model, clip_grad=clip_grad, perturb=perturb)
    assert clip_grad == dict(type='norm', max_norm=1.0)
    assert perturb == dict(norm=False, exclude=['head'])


# ------------------------------------------------------------------ 10. random replay
class MaskWatch:
    """The dropout masks of each forward pass."""

    def __init__(self, model: ToyNet) -> None:
        self.masks: list[Tensor] = Notes()
        model.dropout.register_forward_hook(
            lambda _, inputs, output: self.masks.append((output == 0) & (inputs[0] != 0))
        )


@distinct_two_passes
@pytest.mark.parametrize('replay_rng', [True, False])
def test_dropout_masks_are_replayed(name: str, replay_rng: bool) -> None:
    model = make(dropout=0.5)
    watch = MaskWatch(model)
    model.train_step(batches(1)[0], build(name, model, replay_rng=replay_rng))
    first, second = watch.masks[:2]
    # ReLU's zeros depend on the weights, so that only positions active in both passes can be compared.
    assert first.any()
    agreement = (first == second).float().mean().item()
    assert agreement > 0.97 if replay_rng else agreement < 0.9


@distinct
def test_random_numbers_after_the_step_do_not_depend_on_the_second_pass(name: str) -> None:
    ours, theirs = make(dropout=0.5), make(dropout=0.5)
    torch.manual_seed(5)
    ours.train_step(batches(1)[0], build(name, ours, whole=True))
    after = torch.rand(4)
    torch.manual_seed(5)
    theirs.train_step(batches(1)[0], OptimWrapper(momentum_sgd(theirs)))
    assert torch.equal(after, torch.rand(4))
