"""The methods of the family equal hand-written references, and what they keep is state."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer

from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.checkpoints import through_disk
from tests.references_family import GSAM, MSAM, WSAM, FlatReference, FriendlySAM, IntervalSAM, LookSAM
from tests.toys import NaNSecond, ToyNet, batches, make, same_state
from tests.wrappers import ONE_PASS, build, momentum_sgd

# By case: the wrapper's row and arguments, and the reference's class and arguments.
CASES: dict[str, tuple[str, dict[str, Any], type[FlatReference], dict[str, Any]]] = {
    'sam-interval': ('sam', {'interval': 3}, IntervalSAM, {'interval': 3}),
    'looksam': ('looksam', {'k': 5, 'alpha': 0.7}, LookSAM, {'k': 5, 'alpha': 0.7}),
    'looksam of 3': ('looksam', {'k': 3, 'alpha': 0.3}, LookSAM, {'k': 3, 'alpha': 0.3}),
    'friendlysam': ('friendlysam', {}, FriendlySAM, {'sigma': 1.0, 'lmbda': 0.9}),
    'friendlysam of 0.5': ('friendlysam', {'sigma': 0.8, 'lmbda': 0.5}, FriendlySAM, {'sigma': 0.8, 'lmbda': 0.5}),
    'msam': ('msam', {}, MSAM, {}),
    'wsam': ('wsam', {}, WSAM, {'gamma': 0.9}),
    'wsam coupled': ('wsam', {'gamma': 0.6, 'decouple': False}, WSAM, {'gamma': 0.6, 'decouple': False}),
    'gsam': ('gsam', {}, GSAM, {'alpha': 0.4, 'rho_min': 0.0}),
    'gsam scheduled': (
        'gsam',
        {'rho_min': 0.02, 'alpha': 1.0, 'lr_min': 1e-3},
        GSAM,
        {'alpha': 1.0, 'rho_min': 0.02, 'lr_min': 1e-3},
    ),
}
# Variants, which go through what the others do but for one number.
ARGUMENTS = ('looksam of 3', 'friendlysam of 0.5')
WAYS = ('plain', 'accumulated', 'clipped', 'Adam')
# Those that keep a tensor of each parameter.
KEEP = ('looksam', 'friendlysam')
ALL = ('sam-interval', 'gsam', 'wsam', 'wsam-coupled', 'msam', *KEEP)


def train(wrapper: TwoPassOptimWrapper, model: ToyNet, data: list[Any]) -> None:
    for batch in data:
        model.train_step(batch, wrapper)


@pytest.mark.parametrize(
    ('case', 'way'), [(case, way) for case in CASES for way in (WAYS[:1] if case in ARGUMENTS else WAYS)]
)
def test_thirty_steps_equal_the_reference(case: str, way: str) -> None:
    name, options, kind, settings = CASES[case]
    count = 2 if way == 'accumulated' else 1
    ours, theirs = make(norm=False).double(), make(norm=False).double()
    make_optimizer = partial(_adam) if way == 'Adam' else momentum_sgd
    if count > 1:
        options = {**options, 'accumulative_counts': count}
    if way == 'clipped':
        options = {**options, 'clip_grad': dict(max_norm=0.5)}
        settings = {**settings, 'clip': partial(clip_grad_norm_, max_norm=0.5)}
    wrapper = build(name, ours, make_optimizer(ours), **options)
    reference = kind(theirs, make_optimizer(theirs), **settings)
    data = [
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in batches(30 * count)
    ]
    for number in range(30):
        micro_batches = data[number * count : (number + 1) * count]
        if 'scheduled' in case:
            for optimizer in (wrapper.optimizer, reference.optimizer):
                optimizer.param_groups[0]['lr'] *= 0.97  # never below lr_min
        train(wrapper, ours, micro_batches)
        reference.step(micro_batches)
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def _adam(model: ToyNet) -> Optimizer:
    return Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize('optimizer', ['SGD', 'Adam'])
@pytest.mark.parametrize('dtype', [None, 'float16'])
@pytest.mark.parametrize('name', ALL)
def test_what_is_kept_goes_on_after_a_resume(name: str, optimizer: str, dtype: str | None) -> None:
    def wrap(model: ToyNet) -> TwoPassOptimWrapper:
        base = momentum_sgd(model) if optimizer == 'SGD' else _adam(model)
        return build(name, model, base, dtype=dtype, **({'loss_scale': 64.0} if dtype else {}))

    whole, resumed = make(), make()
    wrapper, data = wrap(whole), batches(7)
    train(wrapper, whole, data[:3])
    resumed.load_state_dict(whole.state_dict())
    second = wrap(resumed)
    second.load_state_dict(through_disk(wrapper.state_dict()))
    second.initialize_count_status(resumed, 3, 7)
    train(wrapper, whole, data[3:])
    train(second, resumed, data[3:])
    assert same_state(whole, resumed)
    assert len(second.kept) == (len(list(resumed.parameters())) if name in KEEP else 0)


@pytest.mark.parametrize('name', ALL)
def test_a_checkpoint_loads_into_a_plain_wrapper(name: str) -> None:
    model = make()
    wrapper = build(name, model, _adam(model))
    first, second = batches(2)
    model.train_step(first, wrapper)
    plain = OptimWrapper(_adam(model))
    plain.load_state_dict(wrapper.state_dict())
    model.train_step(second, plain)


@pytest.mark.parametrize('name', KEEP)
def test_an_overflow_leaves_what_is_kept(name: str) -> None:
    model = make(norm=False)
    wrapper = build(name, model, dtype='float16', loss_scale=dict(init_scale=64.0))
    good, bad = batches(2)
    # Both steps have two passes.
    model.train_step(good, wrapper)
    wrapper.optimizer_steps = 0
    before = [tensor.clone() for tensor in wrapper.kept.values()]
    assert before
    bad['inputs'][0] = 6e4
    model.train_step(bad, wrapper)
    assert all(map(torch.equal, wrapper.kept.values(), before))


BAD = {
    'sam': [('interval', 0), ('interval', 2.5)],
    'friendlysam': [('sigma', -0.5), ('sigma', None), ('lmbda', 0), ('lmbda', 1.0), ('lmbda', '0.9')],
    'wsam': [('gamma', 1.0), ('gamma', -0.1), ('gamma', None), ('decouple', 1)],
    'gsam': [('alpha', -1), ('rho_min', 0.06), ('rho_min', -1), ('lr_max', 0.0), ('lr_min', None)],
    'looksam': [('k', 0), ('k', 2.5), ('alpha', -0.1), ('alpha', None), ('rho', -1)],
}


@pytest.mark.parametrize(
    ('name', 'argument', 'value'), [(name, argument, value) for name, pairs in BAD.items() for argument, value in pairs]
)
def test_arguments_out_of_range_are_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf'OptimWrapper: {argument}={value!r} is not allowed'):
        build(name, make(), **{argument: value})


# ---------------------------------------------------------------- what one of them reduces to
EQUAL: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    'SAM in every step': (('sam-interval', {'interval': 1}), ('sam', {})),
    'ASAM in every step': (('asam', {'interval': 1}), ('asam', {})),
    'Friendly SAM that takes nothing off': (('friendlysam', {'sigma': 0.0}), ('sam', {})),
    'GSAM without weight, at a constant radius': (('gsam', {'alpha': 0.0, 'rho_min': 0.05}), ('sam', {})),
    'LookSAM in every step': (('looksam', {'k': 1}), ('sam', {})),
}


@pytest.mark.parametrize('case', EQUAL)
def test_equal_to_another_bit_for_bit(case: str) -> None:
    models = make(), make()
    for model, (name, options) in zip(models, EQUAL[case], strict=True):
        train(build(name, model, **options), model, batches(5))
    assert same_state(*models)


@pytest.mark.parametrize(('name', 'options'), [('looksam', {'k': 100, 'alpha': 0.0}), ('asam', {'interval': 100})])
def test_the_steps_between_are_the_base_optimizer_s(name: str, options: dict[str, Any]) -> None:
    ours, theirs = make(), make()
    wrapper, base = build(name, ours, **options), OptimWrapper(momentum_sgd(theirs))
    first, *others = batches(4)
    ours.train_step(first, wrapper)
    theirs.load_state_dict(ours.state_dict())
    base.load_state_dict(through_disk(wrapper.state_dict()))
    for batch in others:
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base)
        assert wrapper.last_step is not None
        assert wrapper.last_step.perturbed_loss is None
    assert same_state(ours, theirs)


def test_gsams_radius_follows_the_learning_rate() -> None:
    """A scheduler notes the initial learning rate; warm-up and what lies beyond the range stay within the radii."""
    wrapper = build('gsam', make(), rho_min=0.01, lr_min=0.01)
    (group,) = wrapper.optimizer.param_groups
    assert wrapper.scheduled_rho == pytest.approx(0.05)
    group['initial_lr'] = 0.11
    for lr, rho in ((0.06, 0.03), (0.11, 0.05), (0.2, 0.05), (0.01, 0.01), (0.0, 0.01)):
        group['lr'] = lr
        assert wrapper.scheduled_rho == pytest.approx(rho)
    assert wrapper.log_scalars() == {'rho': pytest.approx(0.01)}


@pytest.mark.parametrize('name', [name for name in ALL if name not in ONE_PASS])
def test_where_the_host_learns_late_of_a_gradient_that_is_not_finite(name: str) -> None:
    """As on an accelerator, which steps along a gradient of zero: nothing moves, and what is kept stays."""
    model = make(NaNSecond, factors={3: float('nan')})
    wrapper = build(name, model, SGD(model.parameters(), lr=0.1), **({'k': 1} if name == 'looksam' else {}))
    wrapper._two_pass.guard.host_knows = False
    first, second = batches(2)
    model.train_step(first, wrapper)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    kept = [tensor.clone() for tensor in wrapper.kept.values()]
    if name == 'sam-interval':
        wrapper.optimizer_steps = 0
    model.train_step(second, wrapper)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, wrapper.kept.values(), kept))


def test_wsam_without_weight_is_the_base_optimizer() -> None:
    ours, theirs = make(), make()
    wrapper, base = build('wsam', ours, gamma=0.0), OptimWrapper(momentum_sgd(theirs))
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        theirs.train_step(batch, base)
    assert same_state(ours, theirs)


@pytest.mark.parametrize(('left', 'right'), [('wsam', 'wsam-coupled'), ('wsam-coupled', 'sam'), ('wsam', 'sam')])
def test_wsam_s_forms_are_one_under_sgd_and_sam_at_equal_weights(left: str, right: str) -> None:
    models = make(norm=False), make(norm=False)
    for model, name in zip(models, (left, right), strict=True):
        options = {'gamma': 0.5} if name.startswith('wsam') else {}
        train(build(name, model, SGD(model.parameters(), lr=0.05), **options), model, batches(10))
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=0.5)])
def test_an_overflow_moves_nothing_beside_the_step(clip_grad: dict[str, float] | None) -> None:
    model = make(NaNSecond, factors={3: float('inf')})
    wrapper = build('wsam', model, dtype='float16', loss_scale=64.0, clip_grad=clip_grad)
    first, second = batches(2)
    model.train_step(first, wrapper)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    model.train_step(second, wrapper)
    assert all(map(torch.equal, model.parameters(), weights))
