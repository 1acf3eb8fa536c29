"""Whatever a config may say: what validation accepts takes a step and keeps the contracts, all else is refused."""

from __future__ import annotations

import copy
import io
import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from mm_sharp.errors import UserError
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.reliability import Holds
from tests.toys import NaNSecond, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import WRAPPERS

EXAMPLES = 25
SECTION = 'Properties'
VALID = 'valid configs drawn at random'
bounded = settings(
    max_examples=EXAMPLES, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One valid config: of a wrapper, its optimizer, the model and the batches."""

    name: str
    options: dict[str, Any]
    optimizer: tuple[type[Optimizer], dict[str, Any]]
    model: dict[str, Any]
    size: int

    def build(self, **optimizer: Any) -> tuple[ToyNet, TwoPassOptimWrapper]:
        model = make(**self.model)
        return model, WRAPPERS[self.name][0](self.base(model, **optimizer), **self.options)

    def base(self, model: nn.Module, **changes: Any) -> Optimizer:
        kind, options = self.optimizer
        return kind(model.parameters(), **{**options, **changes})

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        return batches(count, self.size)

    @property
    def whole(self) -> bool:
        """Whether all samples go through the first pass."""
        return self.name != 'ausam' or self.options['sampling_ratio'] == 1.0

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = self.options['dtype']
        return nullcontext() if dtype is None else torch.autocast('cpu', dtype=getattr(torch, dtype))


share = st.sampled_from([0.05, 0.4, 0.5, 0.99, 1.0])
COMMON = {
    'rho': st.floats(0, 0.5),
    'adaptive': st.sampled_from([False, True, 'tensor', 'layer', 'global']),
    'eta': st.floats(0, 0.1),
    'eps': st.sampled_from([1e-12, 1e-6, 1.0]),
    'perturb': st.sampled_from(
        ['auto', 'all', 'weights', {'norm': False}, {'include': ['conv', 'head'], 'bias': False}]
    ),
    'sync_perturbation': st.booleans(),
    'replay_rng': st.booleans(),
    'dtype': st.sampled_from([None, None, 'bfloat16', 'float16']),
    'loss_scale': st.sampled_from(['dynamic', 512.0, {'init_scale': 1024.0, 'growth_interval': 2}]),
    'accumulative_counts': st.integers(1, 3),
    'clip_grad': st.sampled_from([None, {'max_norm': 0.1}, {'type': 'value', 'clip_value': 0.01}]),
}
momentum = st.none() | st.floats(0, 0.99)
OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    'sam': {},
    'esam': {
        'beta': share, 'gamma': share, 'selection': st.sampled_from(['exact', 'history']),
        'refresh': st.integers(1, 3), 'history_momentum': momentum,
    },
    'ausam': {
        'sampling_ratio': share, 's_min': st.floats(0.01, 1), 's_max': st.floats(1, 3), 'reweight': st.booleans(),
        'history_momentum': momentum, 'prefer': st.sampled_from(['large', 'small']), 'clip_quantile': st.floats(0.1, 1),
    },
}  # fmt: skip
optimizers = st.one_of(
    st.tuples(
        st.just(SGD), st.fixed_dictionaries({'lr': st.floats(1e-4, 0.05), 'momentum': st.sampled_from([0.0, 0.9])})
    ),
    st.tuples(st.just(SGD), st.just({'lr': 0.01, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-4})),
    st.tuples(st.just(Adam), st.fixed_dictionaries({'lr': st.floats(1e-4, 0.01), 'amsgrad': st.booleans()})),
    st.tuples(st.just(AdamW), st.fixed_dictionaries({'lr': st.floats(1e-4, 0.01), 'weight_decay': st.floats(0, 0.1)})),
)
models = st.fixed_dictionaries(
    {'norm': st.booleans(), 'dropout': st.sampled_from([0.0, 0.4]), 'with_cp': st.booleans()}
)
sizes = st.sampled_from([1, 2, 3, 8])
setups = st.one_of([
    st.builds(
        Setup, st.just(name), st.fixed_dictionaries({**COMMON, **own}), optimizers, models, sizes
    )
    for name, own in OWN.items()
])  # fmt: skip


def flags(model: nn.Module) -> tuple[Any, ...]:
    """What a step may not leave changed on a model."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [p.requires_grad for p in model.parameters()], hooks, model.training


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def randomness() -> tuple[bytes, Any, bytes]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()


@bounded
@given(setup=setups)
def test_three_steps_keep_the_contracts(setup: Setup, holds: Holds) -> None:
    """Weights stay finite, the count advances, nothing is left behind, and the caller's dicts stay as they were."""
    given_options = copy.deepcopy(setup.options)
    model, wrapper = setup.build()
    before = flags(model)
    pointers = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    for count, batch in enumerate(setup.batches(3), start=1):
        model.train_step(batch, wrapper)
        assert wrapper.inner_count == count
        assert flags(model) == before
        assert all(p.isfinite().all() for p in model.parameters())
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == pointers
    assert setup.options == given_options
    holds(SECTION, 'three steps with options drawn at random', setup.name, 'all contracts', unit=VALID)


@bounded
@given(setup=setups)
def test_a_step_leaves_what_the_base_optimizers_first_pass_leaves(setup: Setup) -> None:
    """At a learning rate of 0: weights, bit for bit; buffers and random state where it sees the same samples."""
    changes = {'lr': 0.0}
    ours, wrapper = setup.build(**changes)
    theirs = make(**setup.model)
    base = OptimWrapper(setup.base(theirs, **changes))
    (batch,) = setup.batches(1)
    torch.manual_seed(1)
    with setup.autocast():
        theirs.train_step(batch, base)
    after = randomness()
    torch.manual_seed(1)
    ours.train_step(batch, wrapper)
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), make(**setup.model).parameters(), strict=True))
    if setup.whole:
        assert all(same_bits(a, b) for a, b in zip(buffers(ours), buffers(theirs), strict=True))
        if setup.options['replay_rng']:
            assert randomness() == after


@bounded
@given(setup=setups)
def test_a_wrapper_that_was_saved_and_loaded_takes_the_same_step(setup: Setup, holds: Holds) -> None:
    model, wrapper = setup.build()
    *first, last = setup.batches(1 + 2 * setup.options['accumulative_counts'])
    for batch in first:  # whole cycles: a checkpoint holds no gradients
        model.train_step(batch, wrapper)
    file = io.BytesIO()
    torch.save([model.state_dict(), wrapper.state_dict()], file)
    model.train_step(last, wrapper)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, loaded = setup.build()
    other.load_state_dict(weights)
    loaded.load_state_dict(state)
    other.train_step(last, loaded)
    assert same_state(model, other)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        assert left.grad is None or same_bits(left.grad, right.grad)
    holds(
        SECTION,
        'saved and loaded, options drawn at random',
        setup.name,
        'the same next step, bit for bit',
        unit=VALID,
    )


numbers = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**400, 1e-320, 1e300, math.pi, -0.0])
)
wild = st.recursive(
    st.one_of(
        numbers, st.none(), st.booleans(), st.text(max_size=4), st.binary(max_size=2), st.complex_numbers(),
        st.sampled_from(['auto', 'exact', 'history', 'dynamic', 'float16', 'bfloat16', torch.float16, torch.float32]),
        st.builds(np.float64, st.floats()), st.builds(np.int64, st.integers(-3, 3)),
        st.builds(torch.tensor, numbers.filter(lambda n: abs(n) < 1e9)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(['type', 'max_norm', 'clip_value', 'norm_type', 'foreach']), inner, max_size=3),
        st.dictionaries(st.sampled_from(['init_scale', 'growth_interval', 'enabled', 'scale']), inner, max_size=3),
        st.dictionaries(st.sampled_from(['norm', 'bias', 'include', 'exclude']), inner, max_size=3),
    ),
    max_leaves=3,
)  # fmt: skip


def refusal(name: str, model: ToyNet, options: dict[str, Any]) -> str | None:
    """What a wrapper with these options is refused with, if not after two steps; any other error is raised."""
    try:
        wrapper = WRAPPERS[name][0](SGD(model.parameters(), lr=0.01), **options)
        for batch in batches(2, 3):
            model.train_step(batch, wrapper)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.skipif(torch.__version__ < (2, 3), reason='it refuses float16 on the CPU before any other argument')
@settings(bounded, max_examples=100)
@given(data=st.data())
def test_any_value_of_any_argument_is_refused_or_works(data: st.DataObject, holds: Holds) -> None:
    name = data.draw(st.sampled_from(list(OWN)))
    argument = data.draw(st.sampled_from(list({**COMMON, **OWN[name]})))
    value = data.draw(wild)
    more = {'dtype': 'float16'} if argument == 'loss_scale' else {}
    model = make()
    said = refusal(name, model, {argument: value, **more})
    assert said is None or (argument in said and 'rite' in said), 'it does not name the key, or shows no right form'
    assert all(p.isfinite().all() for p in model.parameters())
    holds(
        SECTION,
        'any value of any argument',
        name,
        'accepted and trains, or one UserError that names the argument',
        unit='values of arguments drawn at random',
    )


def test_a_scale_that_overflows_without_end_leaves_the_weights_finite() -> None:
    """It is divided at every overflow, and one over it must stay finite."""
    model = make(NaNSecond, factors=dict.fromkeys(range(12), 1e30))
    options = {'dtype': 'float16', 'loss_scale': {'backoff_factor': 1e-12}}
    wrapper = WRAPPERS['sam'][0](SGD(model.parameters(), lr=0.01), **options)
    before = make(NaNSecond, factors={})
    for batch in batches(8):
        model.train_step(batch, wrapper)
    assert wrapper.precision.scaler._scale.item() >= 1e-38
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_state(model, before)


def test_optimizers_that_step_by_themselves_are_refused() -> None:
    model = make()
    with pytest.raises(UserError, match=r"optimizer=LBFGS .*optimizer=dict\(type='SGD'"):
        WRAPPERS['sam'][0](LBFGS(model.parameters()))
