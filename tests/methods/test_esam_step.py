"""ESAM's first pass computes the gradients of the perturbed tensors and no others: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mm_sharp import ESAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.toys import Notes, ToyNet, batches, make, same_bits
from tests.wrappers import momentum_sgd

aten = torch.ops.aten


class DeepNet(ToyNet):
    """More layers, no two weights of one shape, so that shapes tell them apart.

    Args:
        way: ``'checkpointed'`` recomputes the convolutions, ``'guarded'`` the linear layers where their input requires
            a gradient, as MMPose's backbones do (elsewhere re-entrant checkpointing would lose the gradients).
    """

    def __init__(self, way: str = '') -> None:
        super().__init__(with_cp=way == 'checkpointed')
        self.guarded = way == 'guarded'
        self.conv = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 7, 1), nn.Conv2d(7, 6, 1, bias=False))
        self.body = nn.Sequential(nn.Linear(6 * 4 * 4, 11), nn.ReLU(), nn.Linear(11, 13), nn.ReLU())
        self.head = nn.Linear(13, 3)

    def features(self, inputs: Tensor) -> Tensor:
        hidden = super().features(inputs).flatten(1)
        if self.guarded and hidden.requires_grad:
            return checkpoint(self.body, hidden, use_reentrant=True)
        return self.body(hidden)


class Computed(TorchDispatchMode):
    """The names of the parameters whose gradients are computed, found in the operations that compute them.

    ``passes`` has a list for each forward pass with gradients: what the backward pass after it computed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.passes: list[list[str]] = Notes()
        self.weights = {tuple(p.shape): n for n, p in model.named_parameters() if p.ndim > 1}
        self.norms = {len(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        model.register_forward_pre_hook(self.next_pass)

    def next_pass(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.passes.append([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution_backward.default:
            name, (_, weight, bias) = self.weights[tuple(args[2].shape)], args[10]
            self.note(name, weight)
            self.note(name.replace('weight', 'bias'), bias)
        elif func is aten.native_batch_norm_backward.default:
            name, (_, weight, bias) = self.norms[len(args[2])], args[9]
            self.note(f'{name}.weight', weight)
            self.note(f'{name}.bias', bias)
        elif func is aten.mm.default:  # a linear layer's weight; its input's gradient has the batch's size
            shape = tuple(result.shape)
            self.note(self.weights.get(shape, self.weights.get(shape[::-1], '')), True)
        return result

    def note(self, name: str, computed: bool) -> None:
        if computed and name:
            self.passes[-1].append(name)


class Arrived:
    """The names of the parameters that a gradient reached, pass by pass; and the weights that each forward saw."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[list[str]] = Notes()
        self.weights: list[dict[str, Tensor]] = Notes()
        self.model = model
        model.register_forward_pre_hook(self.next_pass)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self.passes[-1].append(name))

    def next_pass(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.passes.append([])
            self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})


def masks(model: nn.Module, wrapper: ESAMOptimWrapper, steps: int) -> list[set[str]]:
    """The names of the tensors that the wrapper perturbs in each step."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    drawn = [
        weight_mask(len(names), wrapper.beta, make_generator(wrapper.seed, RngStream.MASK, i)) for i in range(steps)
    ]
    return [{name for name, taken in zip(names, mask, strict=True) if taken} for mask in drawn]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def visible(names: set[str]) -> set[str]:
    """Those of ``names`` that operations show: the gradients of linear layers' biases are sums like many others."""
    return {name for name in names if not (name.startswith(('body', 'head')) and name.endswith('bias'))}


WAYS: dict[str, dict[str, Any]] = {
    'float32': {},
    'bfloat16': {'dtype': 'bfloat16'},
    'float16': {'dtype': 'float16', 'loss_scale': 256.0},
    'accumulated': {'accumulative_counts': 2},
    'history': {'selection': 'history', 'refresh': 4},
    'checkpointed': {},
    'guarded': {},
}


@pytest.mark.parametrize('way', WAYS)
def test_the_first_pass_computes_exactly_the_masks_gradients(way: str) -> None:
    model = make(DeepNet, way=way)
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.01), beta=0.6, **WAYS[way])
    before, everything = flags(model), {name for name, _ in model.named_parameters()}
    arrived, computed = Arrived(model), Computed(model)
    steps = 40 if way == 'float32' else 10
    for batch in batches(steps):
        with computed:
            model.train_step(batch, wrapper)
        assert flags(model) == before
    for step, mask in enumerate(masks(model, wrapper, steps)):
        assert sorted(computed.passes[2 * step]) == sorted(visible(mask))
        assert sorted(arrived.passes[2 * step]) == sorted(mask)
        # Checkpointing runs the layers again; still every gradient is computed once.
        assert sorted(computed.passes[2 * step + 1]) == sorted(visible(everything))
        assert sorted(arrived.passes[2 * step + 1]) == sorted(everything)


@pytest.mark.parametrize('beta', [0.2, 0.6, 0.9])
def test_the_count_falls_with_beta(beta: float) -> None:
    model = make(DeepNet)
    wrapper = ESAMOptimWrapper(momentum_sgd(model, 0.01), beta=beta)
    computed, steps = Computed(model), 40
    for batch in batches(steps):
        with computed:
            model.train_step(batch, wrapper)
    tensors = len(visible(set(flags(model))))
    share = sum(map(len, computed.passes[::2])) / (steps * tensors)
    assert abs(share - beta) < 4 * (beta * (1 - beta) / (steps * tensors)) ** 0.5
    assert all(len(names) == tensors for names in computed.passes[1::2])


@pytest.mark.parametrize('way', ['float32', 'bfloat16', 'float16', 'checkpointed', 'guarded'])
def test_the_perturbation_has_length_rho_over_beta_and_nothing_else_moves(way: str) -> None:
    model = make(DeepNet, way=way)
    model.norm.eval()  # on batch statistics, the biases before BatchNorm would have no gradient
    wrapper = ESAMOptimWrapper(SGD(model.parameters(), lr=0.01), rho=0.05, beta=0.4, **WAYS[way])
    arrived = Arrived(model)
    for batch in batches(10):
        model.train_step(batch, wrapper)
    for step, mask in enumerate(masks(model, wrapper, 10)):
        first, second = arrived.weights[2 * step : 2 * step + 2]
        lengths = [(second[name] - first[name]).norm() for name in mask]
        assert torch.stack(lengths).norm().item() == pytest.approx(0.05 / 0.4, rel=1e-4)
        assert {name for name in first if not same_bits(first[name], second[name])} == mask


# ------------------------------------------------------------------ requires_grad
def test_frozen_parameters_stay_frozen_and_are_never_chosen() -> None:
    model = make(DeepNet)
    for parameter in (model.conv[0].weight, model.head.bias):
        parameter.requires_grad_(False)
    before, start = flags(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper = ESAMOptimWrapper(momentum_sgd(model, 0.01), beta=0.6)
    arrived, computed = Arrived(model), Computed(model)
    for batch in batches(10):
        with computed:
            model.train_step(batch, wrapper)
        assert flags(model) == before
    expected = masks(model, wrapper, 10)
    assert [sorted(names) for names in arrived.passes[::2]] == [sorted(mask) for mask in expected]
    assert [sorted(names) for names in computed.passes[::2]] == [sorted(visible(mask)) for mask in expected]
    frozen = {name for name, trained in before.items() if not trained}
    assert frozen == {'conv.0.weight', 'head.bias'}
    for weights in (*arrived.weights, dict(model.named_parameters())):
        assert all(same_bits(weights[name], start[name]) for name in frozen)


def test_what_perturb_leaves_out_gets_no_gradient_in_the_first_pass_either() -> None:
    model = make(DeepNet)
    wrapper = ESAMOptimWrapper(momentum_sgd(model, 0.01), beta=1.0, perturb=dict(include='^body'))
    arrived = Arrived(model)
    model.train_step(batches(1)[0], wrapper)
    assert sorted(arrived.passes[0]) == ['body.0.bias', 'body.0.weight', 'body.2.bias', 'body.2.weight']
    assert len(arrived.passes[1]) == len(flags(model))


class Breaking(DeepNet):
    """Raises in a forward pass by number, or in the backward pass after it."""

    def __init__(self, where: tuple[int, str]) -> None:
        super().__init__()
        self.where, self.forwards = where, Notes()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number = len(self.forwards)
        self.forwards.append(None)  # a list, because the wrapper takes numbers back
        losses = super().forward(*args, **kwargs)
        if self.where == (number, 'forward'):
            raise KeyboardInterrupt
        if self.where == (number, 'backward'):
            losses['loss_square'].register_hook(self.fail)
        return losses

    def fail(self, gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    'where', [(0, 'forward'), (0, 'backward'), (1, 'forward'), (2, 'forward'), (2, 'backward')], ids=str
)
def test_requires_grad_is_as_before_when_an_exception_passes(where: tuple[int, str]) -> None:
    model = make(Breaking, where=where)
    model.head.bias.requires_grad_(False)
    before = flags(model)
    wrapper = ESAMOptimWrapper(momentum_sgd(model), beta=0.3)
    with pytest.raises(KeyboardInterrupt):
        model.train_step(batches(1)[0], wrapper)
    assert flags(model) == before


@pytest.mark.parametrize('left', ['without update_params', 'with an error in between'])
def test_requires_grad_is_as_before_when_a_forward_is_left_alone(left: str) -> None:
    """Of a forward without ``update_params`` nothing may be left in the next step."""
    model = make(DeepNet)
    wrapper = ESAMOptimWrapper(momentum_sgd(model), beta=0.3)
    arrived, before = Arrived(model), flags(model)
    first, second = batches(2)
    try:
        with wrapper.optim_context(model):
            model(**first)
            if left == 'with an error in between':
                raise ValueError(left)
    except ValueError:
        assert flags(model) == before
    model.train_step(second, wrapper)
    assert flags(model) == before
    assert sorted(arrived.passes[1]) == sorted(masks(model, wrapper, 1)[0])
