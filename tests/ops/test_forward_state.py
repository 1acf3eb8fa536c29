"""Every forward pass of a step starts from the state before the first, and the step ends as the first has left it."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.rare_changes import RareChanges
from tests.memory_toys import MEMORIES, Codebook, HandTeacher, Memory, Teacher
from tests.toys import Batch, Notes, ToyNet, batches, make, same_bits
from tests.wrappers import DISTINCT, build, forwards_in, momentum_sgd, resting_sgd, same_weights

everywhere = pytest.mark.parametrize('name', [name for name in DISTINCT if 'loader' not in name])
remembering = pytest.mark.parametrize('kind', MEMORIES)
STEPS = 6


def fresh(kind: type[ToyNet], **kwargs: Any) -> Any:
    """A model whose own random numbers are those of every other one of its kind."""
    return make(kind, **kwargs)


def train_both(ours: Any, wrapper: Any, base: Any, plain: Any, data: list[Batch]) -> None:
    """A step of each on every batch, in turns."""
    for batch in data:
        ours.train_step(batch, wrapper)
        base.train_step(batch, plain)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(same_bits, left, right))


@remembering
@everywhere
def test_a_radius_of_zero_is_the_base_optimizer(name: str, kind: str) -> None:
    ours, base = fresh(MEMORIES[kind]), fresh(MEMORIES[kind])
    wrapper, plain = build(name, ours, whole=True, rho=0.0), OptimWrapper(momentum_sgd(base))
    if name.startswith('esam'):
        wrapper.beta = 1.0
    train_both(ours, wrapper, base, plain, batches(STEPS))
    assert same_weights(name, ours, base)
    if not name.endswith('reweight'):
        assert equal(ours.state(), base.state())


@remembering
@everywhere
def test_every_forward_sees_the_state_before_the_first(name: str, kind: str) -> None:
    model = fresh(MEMORIES[kind])
    wrapper = build(name, model, rho=0.5)
    for step, batch in enumerate(batches(STEPS)):
        before = model.state()
        first = _first_forward(model, wrapper, batch)
        passes, model.seen = model.seen, Notes()
        assert len(passes) == forwards_in(name, step)
        assert all(equal(seen, before) for seen in passes)
        assert equal(model.state(), first)


def _first_forward(model: Memory, wrapper: Any, batch: Batch) -> list[Tensor]:
    """Make a step; returns the state just after its first forward."""
    states: list[list[Tensor]] = []
    hook = model.register_forward_hook(lambda *_: states.append(model.state()))
    model.train_step(batch, wrapper)
    hook.remove()
    return states[0]


@everywhere
@pytest.mark.parametrize('kind', ['Codebook', 'Flat'])
def test_memory_shared_with_weights_keeps_no_perturbation(name: str, kind: str) -> None:
    model = fresh(MEMORIES[kind])
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    wrapper = build(name, model, resting_sgd(model), rho=0.5)
    for batch in batches(3):
        model.train_step(batch, wrapper)
        assert equal(list(model.parameters()), weights)
    assert isinstance(model, Codebook)
    assert model.table.untyped_storage().data_ptr() == model.head.weight.untyped_storage().data_ptr()


def test_statistics_are_put_back_without_the_weights_that_share_their_memory() -> None:
    """After the optimizer's step, which must not be undone with the statistics of a batch that overflows."""
    model = fresh(Codebook)
    wrapper = build('sam', model)
    good, bad = batches(2)
    model.train_step(good, wrapper)
    before = model.head.weight.detach().clone()
    mean, variance = model.norm.running_mean.clone(), model.norm.running_var.clone()
    bad['inputs'][3] = 1e22  # normalised it is finite, but the square of its distance from the mean is not
    loss = model.train_step(bad, wrapper)['loss']
    assert loss.isfinite()
    assert same_bits(model.norm.running_mean, mean)
    assert same_bits(model.norm.running_var, variance)
    assert not same_bits(model.head.weight, before)
    assert same_bits(model.table, model.head.weight)


def test_a_buffer_that_was_never_finite_stops_no_statistics() -> None:
    model = make()
    model.register_buffer('mask', torch.full((3, 3), -torch.inf).triu(1))
    wrapper = build('sam', model)
    for batch in batches(3):
        model.train_step(batch, wrapper)
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize('interval', [1, 3, 10])
@pytest.mark.parametrize('kind', [Teacher, HandTeacher])
def test_a_teacher_that_rests_most_of_the_time(kind: type[Memory], interval: int) -> None:
    class Resting(kind):  # type: ignore[misc, valid-type]
        def recall(self, features: Tensor) -> Tensor:
            self.calls = getattr(self, 'calls', 0) + 1
            return super().recall(features) if self.calls % interval == 0 else torch.zeros(())

    ours, base = fresh(Resting), fresh(Resting)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(4 * interval))
    assert equal(ours.state(), base.state())
    assert same_weights('sam', ours, base)


def test_frozen_weights_are_copied_in_few_steps() -> None:
    """Nothing is paid for what no forward changes; what one changes is kept in every step from then on."""
    rare, kept = RareChanges(), []
    tensor = torch.zeros(3)
    for number in range(1, 101):
        if rare.next_step():
            kept.append(number)
        rare.watch([tensor], [torch.zeros(3)])
        assert not rare.changed()
    assert kept == [*range(1, 11), 15, 21, 28, 36, 45, 55, 66, 78, 91]
    rare.watch([tensor.fill_(1)], [torch.zeros(3)])
    assert rare.changed()
    assert all(rare.next_step() for _ in range(20))


def test_accelerators_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(HostCopy):
        ready = False

    monkeypatch.setattr('mm_sharp.ops.rare_changes.HostCopy', Late)
    rare = RareChanges()
    for _ in range(10):
        rare.next_step()
    meta = type('Elsewhere', (Tensor,), {'device': property(lambda _: torch.device('meta'))})
    elsewhere = torch.zeros(3).as_subclass(meta)
    monkeypatch.setattr(torch, 'stack', lambda flags: torch.tensor([True]))
    rare.watch([elsewhere], [torch.zeros(3).as_subclass(meta)])
    assert rare.changed()
    assert not rare.next_step()
    Late.ready = True
    assert rare.next_step()


def test_frozen_weights_of_a_sharded_model_are_left_alone() -> None:
    model = fresh(HandTeacher)
    state = ForwardState(lambda: list(model.parameters()))
    state.snapshot(ModuleTree(model), sharded=True)
    before = model.teacher.weight.clone()
    model.teacher.weight.add_(1)
    state.rewind()
    state.restore()
    assert same_bits(model.teacher.weight, before + 1)


# ------------------------------------------------------------------ calls
@everywhere
def test_the_users_own_hooks_run_once_a_pass(name: str) -> None:
    class Doubled(ToyNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_forward_pre_hook(self.double, with_kwargs=True)

        @staticmethod
        def double(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, 'inputs': kwargs['inputs'] * 2}

    ours, base = make(Doubled), make(Doubled)
    wrapper, plain = build(name, ours, whole=True, rho=0.0), OptimWrapper(momentum_sgd(base))
    if name.startswith('esam'):
        wrapper.beta = 1.0
    train_both(ours, wrapper, base, plain, batches(2))
    assert same_weights(name, ours, base)


@everywhere
def test_a_model_may_call_itself(name: str) -> None:
    class Nested(ToyNet):
        def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
            if mode == 'mean':
                return super().forward(inputs, targets, mode='tensor').mean(1)
            losses = super().forward(inputs, targets)
            with contextlib.suppress(TypeError):
                self(inputs, targets, mode='mean', unknown=True)
            assert self(inputs[:2], targets[:2], mode='mean').shape == (2,)
            return losses

    ours, base = make(Nested, norm=False), make(ToyNet, norm=False)
    wrapper, plain = build(name, ours, rho=0.1), build(name, base, rho=0.1)
    train_both(ours, wrapper, base, plain, batches(3))
    assert same_weights('sam', ours, base)


@everywhere
@pytest.mark.parametrize('method', ['backward', 'step'])
def test_steps_by_hand_are_refused(name: str, method: str) -> None:
    """MMEngine's own way of three calls would train without any perturbation."""
    model = make()
    wrapper = build(name, model)
    (batch,) = batches(1)
    before = copy.deepcopy(model.state_dict())
    with wrapper.optim_context(model):
        loss = model.parse_losses(model(**batch))[0]
    with pytest.raises(
        RuntimeError,
        match=rf'{method} was called by hand(.|\n)*model.parse_losses(.|\n)*as a tensor.*update_params\(losses\)',
    ):
        wrapper.backward(loss) if method == 'backward' else wrapper.step()
    assert all(same_bits(parameter, before[key]) for key, parameter in model.named_parameters())
    model.train_step(batch, wrapper)
    assert wrapper.last_step is not None


def test_parse_losses_of_a_models_own_runs_once_a_pass() -> None:
    class WarmUp(ToyNet):
        calls = 0

        def parse_losses(self, losses: Any) -> Any:
            self.calls += 1
            total, log = super().parse_losses(losses)
            return total * min(1.0, self.calls / 10), log

    ours, base = make(WarmUp), make(WarmUp)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(3))
    assert ours.calls == base.calls == 3
    assert same_weights('sam', ours, base)


def test_a_parameter_that_is_twice_in_a_group_counts_once() -> None:
    model = make(norm=False)
    weights = list(model.parameters())
    with pytest.warns(UserWarning, match='duplicate parameters'):
        optimizer = SGD([*weights, weights[0]], lr=0.1)
    wrapper = build('sam', model, optimizer, rho=0.05)
    places: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: places.append(torch.cat([w.detach().flatten() for w in weights])))
    model.train_step(batches(1)[0], wrapper)
    assert (places[1] - places[0]).norm().item() == pytest.approx(0.05, rel=1e-4)


ODD = {
    'sparse': lambda: torch.eye(3).to_sparse(),
    'compressed': lambda: torch.eye(3).to_sparse_csr(),
    'nested': lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    'mkldnn': lambda: torch.ones(2, 2).to_mkldnn(),
    'overlapping': lambda: torch.arange(6.0).as_strided((3, 4), (1, 1)),
    'expanded': lambda: torch.zeros(1).expand(5),
    'float8': lambda: torch.ones(3).to(torch.float8_e4m3fn),
    'complex': lambda: torch.ones(3, dtype=torch.complex64),
    **({'uint16': lambda: torch.ones(3, dtype=torch.uint16)} if hasattr(torch, 'uint16') else {}),  # from torch 2.3 on
    'meta': lambda: torch.empty(3, device='meta'),
}


@pytest.mark.filterwarnings('ignore:Sparse CSR', 'ignore:The PyTorch API of nested')
@pytest.mark.parametrize('kind', [*ODD, 'inference', 'quantized'])
def test_buffers_of_every_kind_train(kind: str) -> None:
    def odd() -> Tensor:
        with torch.inference_mode(kind == 'inference'):
            return ODD.get(kind, lambda: torch.ones(3))()

    ours, base = make(), make()
    for model in (ours, base):
        model.register_buffer('odd', odd(), persistent=False)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(2))
    assert same_weights('sam', ours, base)


def test_generators_of_a_models_own_draw_the_same_in_every_pass() -> None:
    class Drawing(Memory):
        def remember(self) -> None:
            self.own, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)
            self.python, self.system = random.Random(1), random.SystemRandom()  # which has no state

        def recall(self, features: Tensor) -> Tensor:
            return torch.rand(6, 1, 1, generator=self.own) + self.numpy.random() + self.python.random()

    ours, base = fresh(Drawing), fresh(Drawing)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(3))
    assert same_weights('sam', ours, base)
    assert same_bits(ours.own.get_state(), base.own.get_state())
    assert ours.numpy.random() == base.numpy.random()
    assert ours.python.random() == base.python.random()


@pytest.mark.parametrize('kind', [dict, OrderedDict, Counter, lambda: defaultdict(int)])
def test_dicts_of_every_kind_are_put_back(kind: Callable[[], Any]) -> None:
    class Counting(Memory):
        def remember(self) -> None:
            self.counts = kind()

        def recall(self, features: Tensor) -> Tensor:
            self.counts['forwards'] = self.counts.get('forwards', 0) + 1
            return torch.tensor(float(self.counts['forwards']))

    ours, base = fresh(Counting), fresh(Counting)
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(3))
    assert same_weights('sam', ours, base)
    assert ours.counts == base.counts == {'forwards': 3}
    assert type(ours.counts) is type(base.counts)


class Registering(Memory):
    """Makes a buffer in its first forward, fills one that was None, and has state of other kinds than tensors."""

    def remember(self) -> None:
        self.register_buffer('later', None)
        self.pair, self.array, self.number = (0, 0.0), np.zeros(6), np.float64(0)

    def recall(self, features: Tensor) -> Tensor:
        known = torch.zeros(6) if self.later is None else self.later
        if not hasattr(self, 'made'):
            self.register_buffer('made', torch.zeros(6))
        means = features.mean((0, 2, 3))
        self.made += means
        self.later = known + means
        self.pair = (self.pair[0] + 1, self.pair[1] + 0.5)
        self.array, self.number = self.array + 1, self.number + 1
        return (known + self.made + sum(self.pair) + torch.from_numpy(self.array).float()).view(6, 1, 1) / self.number


@everywhere
def test_new_buffers_and_attributes_of_every_kind(name: str) -> None:
    ours, base = fresh(Registering), fresh(Registering)
    wrapper, plain = build(name, ours, whole=True, rho=0.0), OptimWrapper(momentum_sgd(base))
    if name.startswith('esam'):
        wrapper.beta = 1.0
    train_both(ours, wrapper, base, plain, batches(3))
    assert same_weights(name, ours, base)
    assert ours.pair == base.pair == (3, 1.5)


@pytest.mark.filterwarnings('ignore')  # torch speaks against its own tracing
def test_a_traced_part_trains() -> None:
    ours, base, example = make(), make(), torch.randn(4, 6, 4, 4)
    for model in (ours, base):
        model.norm = torch.jit.trace(model.norm, example)  # which moves its statistics
    wrapper, plain = build('sam', ours, rho=0.0), OptimWrapper(momentum_sgd(base))
    train_both(ours, wrapper, base, plain, batches(2))
    assert same_weights('sam', ours, base)


def test_copies_of_frozen_weights_are_given_back() -> None:
    model = fresh(HandTeacher)
    model.move = lambda: None
    wrapper = build('sam', model)
    for batch in batches(3):
        model.train_step(batch, wrapper)
        assert not wrapper._two_pass.state._before.rare_backup._memory
        assert not wrapper._two_pass.state._after.rare_backup._memory


def test_frozen_weights_that_the_second_pass_alone_moves() -> None:
    """A teacher that is the student's equal does not move in the first forward, and would at the perturbed weights."""
    model = fresh(HandTeacher)
    teacher = model.teacher.weight.clone()
    wrapper = build('sam', model, rho=0.5)
    model.train_step(batches(1)[0], wrapper)
    assert torch.allclose(model.teacher.weight, teacher, atol=1e-7)


@everywhere
def test_update_params_belongs_behind_the_context(name: str) -> None:
    model = make()
    wrapper = build(name, model)
    (batch,) = batches(1)
    with (
        pytest.raises(RuntimeError, match=r'update_params was called inside optim_context(.|\n)*Call it behind it'),
        wrapper.optim_context(model),
    ):
        wrapper.update_params(model.parse_losses(model(**batch))[0])
    model.train_step(batch, wrapper)


def test_a_forward_that_failed_may_be_tried_again() -> None:
    class Failing(ToyNet):
        failures: ClassVar[list[int]] = [1]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.failures:
                self.failures.pop()
                raise MemoryError
            return super().forward(*args, **kwargs)

    model = make(Failing)
    wrapper = build('sam', model)
    (batch,) = batches(1)
    with wrapper.optim_context(model):
        with pytest.raises(MemoryError):
            model(**batch)
        losses = model(**batch)
    wrapper.update_params(model.parse_losses(losses)[0])
    assert wrapper.last_step is not None
