"""Sharpness-aware training of quantized models: what moves, what stays, and that it is the method it says it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mm_sharp import ESAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.quantization import calibrate
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.quantized_toys import (
    LEARNED,
    POLICIES,
    Parameters,
    ResidualToy,
    Watch,
    batches,
    copy_parameters,
    is_spared,
    parameters_of,
    plain_state,
    pool_batches,
    quantized,
    slow_sgd,
    uncalibrated,
    unequal,
)
from tests.references import gradients_of, sam_perturbation
from tests.references_ausam import ReferenceAUSAM, mean_sizes, mean_squares, terms
from tests.references_esam import ReferenceESAM
from tests.toys import Batch, Notes, same_bits, same_state
from tests.wrappers import build, momentum_sgd

NAMES = ('sam', 'asam', 'friendlysam', 'gsam', 'wsam', 'esam', 'esam-history', 'ausam', 'ausam-reweight')
THREE = ('sam', 'esam', 'ausam')
WITH_SLOW = [name if name in THREE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


class Rows:
    """The ids of the samples that each forward pass with gradients ran on."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: list[list[int]] = Notes()
        # After the forward: AUSAM's own hook takes the samples out before it.
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.ids.append(kwargs['sample_idx'].tolist())


# ------------------------------------------------------------------ training runs, of which many tests look at a part
@dataclass
class Step:
    """One micro-batch.

    Args:
        first: Parameters at the first forward.
        second: Parameters at the second forward.
        restored: Parameters when the optimizer steps; empty where it does not.
        state: Buffers, numbers and flags afterwards.
        expected: The same of a model of the same weights after the base optimizer's pass.
    """

    first: Parameters
    second: Parameters
    restored: Parameters
    state: dict[str, object]
    expected: dict[str, object]


@dataclass
class Run:
    """Some steps on a quantized toy; every sample goes through both passes."""

    model: ResidualToy
    before: dict[str, object]
    start: Parameters
    pointers: list[int]
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """How a toy is trained.

    Args:
        name: Wrapper.
        policy: One of ``POLICIES``.
        steps: Micro-batches.
        options: The wrapper's.
        with_cp: Whether convolutions are recomputed.
    """

    name: str
    policy: str
    steps: int = 3
    options: tuple[tuple[str, Any], ...] = ()
    with_cp: bool = False

    def __str__(self) -> str:
        options = ''.join(f'-{value}' for _, value in self.options)
        return f'{self.name}-{self.policy}{options}{"-checkpointed" * self.with_cp}'


HALF = {dtype: (('dtype', dtype), ('loss_scale', 64.0)) for dtype in ('bfloat16', 'float16')}
CASES = (
    *(Case('sam', policy, steps=5 if 'folded' in policy else 8) for policy in LEARNED),
    *(Case('sam', policy) for policy in POLICIES if policy not in LEARNED),
    *(Case(name, policy) for name in NAMES[1:] for policy in ('W4A4', 'W2A4 folded')),
    *(Case(name, 'W4A4', options=options) for name in THREE for options in HALF.values()),
    *(Case(name, 'W4A4 folded', steps=4, options=(('accumulative_counts', 2),)) for name in THREE),
    *(Case(name, 'W4A4', with_cp=True) for name in THREE),
)
# Fast: SAM with every policy, ESAM with one, and AUSAM, which has the most of its own, with every option.
SLOW = [
    case
    for case in CASES
    if case.name not in THREE
    or (case.name != 'sam' and case.policy == 'W2A4 folded')
    or (case.name != 'ausam' and (case.options or case.with_cp))
]
everywhere = pytest.mark.parametrize(
    'case', [pytest.param(case, id=str(case), marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]
)


@functools.cache
def run(case: Case) -> Run:
    """Train, and beside every step run the base optimizer's pass on a second model of the same weights."""
    ours, theirs = (quantized(case.policy, with_cp=case.with_cp) for _ in range(2))
    options = dict(case.options)
    wrapper = build(case.name, ours, slow_sgd(ours), whole=True, **options)
    base = BaseWrapper(SGD(theirs.parameters(), lr=0.0), **options)
    found = Run(ours, plain_state(ours), parameters_of(ours), [p.data_ptr() for p in ours.parameters()])
    watch, restored = Watch(ours), []
    wrapper.optimizer.register_step_pre_hook(lambda *_: restored.append(parameters_of(ours)))
    for batch in batches(case.steps):
        copy_parameters(ours, theirs)
        theirs.train_step(batch, base)
        ours.train_step(batch, wrapper)
        first, second = watch.seen
        at_step = restored.pop() if restored else {}
        found.steps.append(Step(first, second, at_step, plain_state(ours), plain_state(theirs)))
        watch.seen.clear()
    return found


class BaseWrapper(OptimWrapper):
    """The base optimizer as MMEngine runs it; its own wrapper for mixed precision refuses the CPU."""

    def __init__(self, optimizer: Optimizer, dtype: str | None = None, loss_scale: float = 1.0, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.dtype = getattr(torch, dtype) if dtype else None
        self.loss_scale = loss_scale if dtype == 'float16' else 1.0

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', self.dtype, enabled=self.dtype is not None):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss * self.loss_scale, **kwargs)

    def step(self, **kwargs: Any) -> None:
        for parameter in self.optimizer.param_groups[0]['params']:
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale
        super().step(**kwargs)


# ------------------------------------------------------------------ 1. side effects
@everywhere
def test_buffers_counters_and_flags_are_those_of_the_first_pass_alone(case: Case) -> None:
    for step in run(case).steps:
        assert step.state.keys() == step.expected.keys()
        assert [name for name in step.state if step.state[name] != step.expected[name]] == []


@everywhere
def test_after_calibration_only_batchnorms_statistics_change(case: Case) -> None:
    found = run(case)
    after = found.steps[-1].state
    changed = {name for name in after if after[name] != found.before.get(name)}
    layers = ['sum_norm'] if 'folded' in case.policy else ['norm', 'branch_norm', 'sum_norm']
    assert changed == {
        f'{layer}.{name}' for layer in layers for name in ('running_mean', 'running_var', 'num_batches_tracked')
    }
    attributes = {name.rpartition('.')[2] for name in after}
    assert {'counter', 'collect_stats_steps', 'observer_only', 'training'} <= attributes
    assert 'init_done' in attributes or case.policy == 'statistics'


@pytest.mark.parametrize('name', WITH_SLOW)
def test_a_quantizer_that_still_collects_statistics_counts_once_a_step(name: str) -> None:
    """None does after calibration; in a model that was quantized otherwise, one may."""
    ours, theirs = quantized('W8A8'), quantized('W8A8')
    for module in (*ours.modules(), *theirs.modules()):
        if hasattr(module, 'collect_stats_steps'):
            module.counter = 10
    wrapper = build(name, ours, SGD(ours.parameters(), lr=0.0), whole=True)
    base = OptimWrapper(SGD(theirs.parameters(), lr=0.0))
    for batch in batches(3):
        theirs.train_step(batch, base)
        ours.train_step(batch, wrapper)
        assert plain_state(ours) == plain_state(theirs)
    scalings = [
        model.branch.input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
        for model in (ours, quantized('W8A8'))
    ]
    assert scalings[0].counter == 13
    assert not same_bits(scalings[0].buffer, scalings[1].buffer)


# ------------------------------------------------------------------ 2. what is perturbed, and what is trained
@everywhere
def test_float_weights_are_perturbed_and_scales_and_biases_are_not(case: Case) -> None:
    for step in run(case).steps:
        moved = unequal(step.first, step.second)
        weights = {name for name in step.first if not is_spared(name)}
        assert moved
        assert moved <= weights
        if not case.name.startswith('esam'):
            assert moved == weights


@everywhere
def test_everything_is_trained(case: Case) -> None:
    found = run(case)
    fixed = set(found.start) - unequal(found.start, parameters_of(found.model))
    # BatchNorm takes the effect of a bias before it away.
    fixed -= {'branch.bias' if 'folded' in case.policy else 'conv.bias'}
    by_policy = {name for name in found.start if 'input_quant' in name} if case.policy == 'statistics' else set()
    assert fixed == by_policy
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())


@pytest.mark.parametrize('policy', ['W8A8', 'W4A4 folded', 'W2A4'])
def test_momentum_sam_perturbs_float_weights_and_restores_them(policy: str) -> None:
    model = quantized(policy)
    wrapper, watch = build('msam', model, momentum_sgd(model, lr=0.0)), Watch(model)
    before, pointers = parameters_of(model), [p.data_ptr() for p in model.parameters()]
    for batch in batches(3):
        model.train_step(batch, wrapper)
        assert not unequal(before, parameters_of(model))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    first, *others = watch.seen
    assert not unequal(before, first)
    assert all(unequal(before, seen) == {name for name in before if not is_spared(name)} for seen in others)


@pytest.mark.parametrize('policy', ['W8A8', 'W4A4 folded', 'W2A4', 'zero points'])
def test_all_parameters_are_perturbed_on_demand(policy: str) -> None:
    model = quantized(policy)
    watch = Watch(model)
    model.train_step(batches(1)[0], build('sam', model, SGD(model.parameters(), lr=0.0), perturb='all'))
    first, second = watch.seen
    moved = unequal(first, second)
    assert {'head.bias', *(name for name in first if name.endswith(('weight', 'scaling_impl.value')))} <= moved
    assert not unequal(first, parameters_of(model))


@pytest.mark.parametrize('policy', LEARNED)
def test_the_integers_of_the_second_pass_are_others_on_the_same_grid(policy: str) -> None:
    model = quantized(policy)
    seen: list[Any] = []
    model.branch.weight_quant.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.train_step(batches(1)[0], build('sam', model, slow_sgd(model)))
    first, second = seen
    assert same_bits(first.scale, second.scale)
    integers = [(value.value / value.scale).round() for value in (first, second)]
    assert (integers[0] != integers[1]).any()
    assert max(value.abs().max().item() for value in integers) <= 2 ** (POLICIES[policy]['weight_bit_width'] - 1) - 1


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('name', THREE)
def test_scales_of_small_inputs_are_trained_in_mixed_precision(name: str, dtype: str) -> None:
    """A scale's gradient is a sum over x / scale**2: in float16 infinite here, at every loss scale."""
    model = uncalibrated('W8A8')
    data = [{**batch, 'inputs': batch['inputs'] * 0.01} for batch in batches(3)]
    calibrate(model, data)
    start = parameters_of(model)
    wrapper = build(name, model, slow_sgd(model), **dict(HALF[dtype]))
    for batch in data:
        model.train_step(batch, wrapper)
    assert unequal(start, parameters_of(model)) >= {key for key in start if 'tensor_quant' in key}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------ 3. restoration
@everywhere
def test_all_parameters_are_restored_bit_for_bit_in_their_storage(case: Case) -> None:
    found = run(case)
    stepped = [step for step in found.steps if step.restored]
    assert len(stepped) == case.steps // dict(case.options).get('accumulative_counts', 1)
    for step in stepped:
        assert not unequal(step.first, step.restored)
    assert [p.data_ptr() for p in found.model.parameters()] == found.pointers


@pytest.mark.parametrize('name', WITH_SLOW)
@pytest.mark.parametrize('policy', ['W4A4', 'W2A4 folded'])
def test_an_error_in_the_second_forward_leaves_everything_as_it_was(name: str, policy: str) -> None:
    model = quantized(policy)
    wrapper = build(name, model, slow_sgd(model))
    model.train_step(batches(1)[0], wrapper)
    passes: list[None] = []

    def fail(*_: Any) -> None:
        passes.append(None)
        if len(passes) == 2:
            raise KeyboardInterrupt

    handle = model.head.weight_quant.register_forward_hook(fail)
    before, state, pointers = parameters_of(model), plain_state(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        model.train_step(batches(2)[1], wrapper)
    handle.remove()
    assert not unequal(before, parameters_of(model))
    assert plain_state(model) == state
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------ 4. rho = 0
@pytest.mark.parametrize('policy', POLICIES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(policy: str) -> None:
    compare_at_rho_zero('sam', policy)


OPTIONS: dict[str, dict[str, Any]] = {
    'accumulated': dict(accumulative_counts=3, clip_grad=dict(max_norm=0.5)),
    'checkpointed': dict(with_cp=True),
    'bfloat16': dict(HALF['bfloat16']),
    'float16': dict(HALF['float16']),
}


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize(
    'name', [name if name == 'ausam' else pytest.param(name, marks=pytest.mark.slow) for name in THREE]
)
def test_rho_zero_is_the_base_optimizer_with_its_companions(name: str, option: str) -> None:
    compare_at_rho_zero(name, 'W4A4', **OPTIONS[option])


def compare_at_rho_zero(name: str, policy: str, with_cp: bool = False, **options: Any) -> None:
    ours, theirs = (quantized(policy, with_cp=with_cp) for _ in range(2))
    wrapper = build(name, ours, slow_sgd(ours), rho=0.0, whole=True, **copy.deepcopy(options))
    base = BaseWrapper(slow_sgd(theirs), **copy.deepcopy(options))
    for model, optim_wrapper in ((ours, wrapper), (theirs, base)):
        optim_wrapper.initialize_count_status(model, 0, 4)
        for batch in batches(4):
            model.train_step(batch, optim_wrapper)
    assert same_state(ours, theirs)
    assert not same_state(ours, quantized(policy, with_cp=with_cp))
    assert plain_state(ours) == plain_state(theirs)


# ------------------------------------------------------------------ 5. references
def reference_step(model: nn.Module, optimizer: Optimizer, batch: Batch, rho: float) -> None:
    """SAM's step by hand: climb on the float weights alone, through Brevitas's own straight-through estimators."""
    everything = list(model.parameters())
    weights = [parameter for name, parameter in model.named_parameters() if name.split('.')[-1] == 'weight']
    gradients = gradients_of(model.parse_losses(model(**batch))[0], weights)
    kept = [tensor.detach().clone() for tensor in (*everything, *model.buffers())]
    with torch.no_grad():
        for weight, step in zip(weights, sam_perturbation(gradients, rho), strict=True):
            weight.add_(step)
    final = gradients_of(model.parse_losses(model(**batch))[0], everything)
    with torch.no_grad():
        for tensor, value in zip((*everything, *model.buffers()), kept, strict=True):
            tensor.copy_(value)
    for parameter, gradient in zip(everything, final, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('policy', [*LEARNED, 'zero points'])
def test_ten_steps_equal_the_reference_bit_for_bit(policy: str) -> None:
    ours, theirs = quantized(policy), quantized(policy)
    wrapper, optimizer = build('sam', ours, slow_sgd(ours)), slow_sgd(theirs)
    for batch in batches(10):
        ours.train_step(batch, wrapper)
        reference_step(theirs, optimizer, batch, 0.05)
        assert same_state(ours, theirs)
    assert not same_state(ours, quantized(policy))


def masked(wrapper: ESAMOptimWrapper, model: nn.Module, step: int) -> list[bool]:
    """Which of the model's parameters the wrapper perturbs in a step: it draws among those that are not spared."""
    names = [name for name, _ in model.named_parameters()]
    mask = weight_mask(
        sum(not is_spared(name) for name in names), wrapper.beta, make_generator(wrapper.seed, RngStream.MASK, step)
    )
    drawn = iter(mask)
    return [not is_spared(name) and next(drawn) for name in names]


@pytest.mark.parametrize('refresh', [None, 3], ids=['exact', 'history'])
@pytest.mark.parametrize('policy', ['W4A4 folded', 'W2A4'])
def test_esam_equals_its_reference_bit_for_bit(policy: str, refresh: int | None) -> None:
    """Both passes' subsets, masks and scales: the second pass runs on the samples that the reference takes."""
    ours, theirs = quantized(policy), quantized(policy)
    selecting: dict[str, Any] = dict(selection='history', refresh=refresh) if refresh else {}
    wrapper = ESAMOptimWrapper(slow_sgd(ours), **selecting)
    reference = ReferenceESAM(theirs, slow_sgd(theirs), refresh=refresh)
    rows = Rows(ours)
    for step, batch in enumerate(pool_batches(6)):
        order = torch.randperm(8, generator=make_generator(wrapper.seed, RngStream.TIES, 0, step)).tolist()
        mask = masked(wrapper, ours, step)
        ours.train_step(batch, wrapper)
        reference.step(batch, mask, order)
        assert rows.ids[-2:] == [batch['sample_idx'].tolist(), batch['sample_idx'][reference.rows[-1]].tolist()]
        assert same_state(ours, theirs)
    assert not same_state(ours, quantized(policy))


@pytest.mark.parametrize('policy', ['W4A4 folded', 'W2A4'])
@pytest.mark.parametrize('reweight', [False, True], ids=['plain', 'reweighted'])
def test_ausam_equals_its_reference_bit_for_bit(policy: str, reweight: bool) -> None:
    """The reference perturbs everything, and so does AUSAM here."""
    ours, theirs = quantized(policy), quantized(policy)
    wrapper = build('ausam', ours, slow_sgd(ours), reweight=reweight, perturb='all')
    reference = ReferenceAUSAM(theirs, slow_sgd(theirs), terms(mean_squares, mean_sizes), reweight=reweight)
    rows = Rows(ours)
    for batch in pool_batches(6):
        ours.train_step(batch, wrapper)
        chosen = wrapper._draw.chosen.tolist()
        assert rows.ids[-2:] == [batch['sample_idx'][chosen].tolist()] * 2
        assert len(chosen) == 5
        pi = reference.step(batch, chosen)
        assert wrapper._draw.pi == pytest.approx(pi, rel=1e-12, abs=0)
        assert same_state(ours, theirs)
    assert not same_state(ours, quantized(policy))


# ------------------------------------------------------------------ 6. the first backward
NEEDED_TWICE = [('sam', 'all'), ('friendlysam', 'auto'), ('gsam', 'auto'), ('wsam', 'auto')]
NEEDED_ONCE = [(name, perturb) for name in ('sam', 'ausam') for perturb in ('auto', 'weights')]


@pytest.mark.parametrize('policy', ['W8A8 folded', 'W4A4', 'zero points'])
@pytest.mark.parametrize(('name', 'perturb'), [*NEEDED_ONCE, *NEEDED_TWICE])
@pytest.mark.parametrize('with_cp', [False, True], ids=['', 'checkpointed'])
def test_scales_get_a_gradient_in_the_first_pass_only_where_it_is_of_use(
    name: str, perturb: str, policy: str, with_cp: bool
) -> None:
    model = quantized(policy, **({'with_cp': True} if with_cp else {}))
    wrapper = build(name, model, slow_sgd(model), perturb=perturb)
    received: list[str] = []
    for parameter_name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=parameter_name: received.append(name))
    names = [name for name, _ in model.named_parameters()]
    scales = [name for name in names if 'tensor_quant' in name]
    assert scales
    for batch in batches(2):
        received.clear()
        model.train_step(batch, wrapper)
        once = scales if (name, perturb) in NEEDED_ONCE else []
        assert sorted(received) == sorted([*names, *(name for name in names if name not in once)])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize('policy', ['W8A8 folded', 'W4A4', 'zero points'])
def test_esam_gives_no_gradient_in_the_first_pass_but_to_what_it_perturbs(policy: str) -> None:
    """Scales, zero points and biases, which are never perturbed, get one in the second pass alone."""
    model = quantized(policy)
    wrapper = build('esam', model, slow_sgd(model))
    received: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: received.append(name))
    names = [name for name, _ in model.named_parameters()]
    left_out: set[str] = set()
    for step, batch in enumerate(batches(5)):
        received.clear()
        mask = masked(wrapper, model, step)
        model.train_step(batch, wrapper)
        assert sorted(received) == sorted(names + [name for name, taken in zip(names, mask, strict=True) if taken])
        left_out |= {name for name, taken in zip(names, mask, strict=True) if not taken}
    assert any(not is_spared(name) for name in left_out), 'no weight was left out'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of torch's compiler, against itself
def test_a_compiled_model_is_compiled_once_for_each_pass() -> None:
    """The first pass leaves scales out of the graph, and so is another program than the second."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ours, plain = quantized('W4A4'), quantized('W4A4')
    ours.forward = torch.compile(ours.forward, backend=backend)  # type: ignore[method-assign]
    left, right = build('sam', ours, slow_sgd(ours)), build('sam', plain, slow_sgd(plain))
    for batch in batches(4):
        ours.train_step(batch, left)
        plain.train_step(batch, right)
        assert len(graphs) == 2
    for name, value in plain.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-5), name
