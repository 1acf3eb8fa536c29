"""``perturb_quantized``: the second pass multiplies by Q(w) + e, and everything else is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp import AUSAMOptimWrapper, ESAMOptimWrapper, SAMOptimWrapper
from tests import toys
from tests.quantized_toys import ResidualToy, Watch, batches, is_spared, parameters_of, quantized, slow_sgd, unequal
from tests.toys import Notes, ToyNet, make, same_bits

RHO = 0.05
LAYERS = ('conv', 'branch')


class Multiplied:
    """The weights that a layer multiplies its input by, call by call with gradients."""

    def __init__(self, layer: Any) -> None:
        self.seen: list[Tensor] = Notes()
        self._inner = layer.inner_forward_impl
        layer.inner_forward_impl = self

    def __call__(self, inputs: Any, weight: Any, bias: Any) -> Any:
        if torch.is_grad_enabled():
            self.seen.append(torch.as_tensor(getattr(weight, 'value', weight)).detach().clone())
        return self._inner(inputs, weight, bias)


def gradients_of(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """By parameter's name, the gradient of the batch's loss."""
    model.zero_grad()
    model.parse_losses(model(**batch, mode='loss'))[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def perturbations(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """rho * g / norm over the float weights, from one plain backward pass."""
    gradients = gradients_of(model, batch)
    names = [name for name, _ in model.named_parameters() if not is_spared(name) and name in gradients]
    norm = torch.cat([gradients[name].flatten() for name in names]).norm()
    return {name: RHO * gradients[name] / norm for name in names}


@pytest.mark.parametrize('bits', ['W8A8', 'W4A4', 'W2A4 folded'])
def test_the_second_pass_multiplies_by_the_perturbed_quantized_weight(bits: str) -> None:
    model, reference = quantized(bits), quantized(bits)
    (batch,) = batches(1)
    expected = perturbations(reference, batch)
    wrapper = SAMOptimWrapper(slow_sgd(model), rho=RHO, perturb_quantized=True)
    used = {name: Multiplied(model.get_submodule(name)) for name in LAYERS}
    watch = Watch(model)
    model.train_step(batch, wrapper)
    for name in LAYERS:
        first, second = used[name].seen
        step = second - first
        assert torch.allclose(step, expected[f'{name}.weight'], atol=1e-6)
        assert step.abs().max() > 1e-4
    # The float weights of quantized layers did not move; those of norms, which have no quantizer, did.
    before, during = watch.seen
    assert {name for name in unequal(before, during) if name.split('.')[0] in LAYERS} == set()
    assert 'sum_norm.weight' in unequal(before, during)


def test_relative_to_the_float_weights() -> None:
    model = quantized('W4A4')
    sizes = {name: model.get_submodule(name).weight.norm() for name in LAYERS}
    used = {name: Multiplied(model.get_submodule(name)) for name in LAYERS}
    model.train_step(batches(1)[0], SAMOptimWrapper(slow_sgd(model), rho=RHO, adaptive='layer', perturb_quantized=True))
    for name in LAYERS:
        first, second = used[name].seen
        assert (second - first).norm().item() == pytest.approx(RHO * sizes[name].item(), rel=1e-4)


def test_the_usual_perturbation_moves_whole_steps_instead() -> None:
    """What the option is for: under the quantizer, the same e leaves most integers where they are."""
    model = quantized('W4A4')
    used = Multiplied(model.get_submodule('branch'))
    model.train_step(batches(1)[0], SAMOptimWrapper(slow_sgd(model), rho=RHO))
    first, second = used.seen
    assert (first == second).float().mean() > 0.5


@pytest.mark.parametrize('kind', [SAMOptimWrapper, ESAMOptimWrapper, AUSAMOptimWrapper])
def test_it_trains_and_leaves_no_hook(kind: Any) -> None:
    model = quantized('W4A4')
    wrapper = kind(slow_sgd(model), rho=RHO, perturb_quantized=True)
    before = parameters_of(model)
    for batch in batches(4):
        model.train_step(batch, wrapper)
    moved = unequal(before, parameters_of(model))
    assert {f'{name}.weight' for name in LAYERS} <= moved
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(layer.weight_quant._forward_hooks for layer in map(model.get_submodule, LAYERS))


def test_rho_0_is_the_base_optimizer() -> None:
    models = quantized('W4A4'), quantized('W4A4')
    wrappers = (
        OptimWrapper(slow_sgd(models[0])),
        SAMOptimWrapper(slow_sgd(models[1]), rho=0.0, perturb_quantized=True),
    )
    for batch in batches(4):
        for model, wrapper in zip(models, wrappers, strict=True):
            model.train_step(batch, wrapper)
    assert unequal(parameters_of(models[0]), parameters_of(models[1])) == set()


def test_the_update_is_the_gradient_at_the_perturbed_quantized_weights() -> None:
    """Against a model whose quantizers' outputs are moved by hand."""
    model, reference = quantized('W4A4'), quantized('W4A4')
    (batch,) = batches(1)
    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.1), rho=RHO, perturb='weights', perturb_quantized=True)
    movements = perturbations_of_weights(reference, batch)
    model.train_step(batch, wrapper)

    def shift(name: str) -> Any:
        return lambda _module, _inputs, output: output._replace(value=output.value + movements[f'{name}.weight'])

    quantized_layers = [name[: -len('.weight')] for name in movements]
    handles = [
        reference.get_submodule(name).weight_quant.register_forward_hook(shift(name)) for name in quantized_layers
    ]
    gradients = gradients_of(reference, batch)
    for handle in handles:
        handle.remove()
    for name, parameter in reference.named_parameters():
        stepped = parameter - 0.1 * gradients[name] if name in gradients else parameter
        assert torch.allclose(dict(model.named_parameters())[name], stepped, atol=2e-6), name


def perturbations_of_weights(model: ResidualToy, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The same for ``perturb='weights'``: only layers' weights, no norms'."""
    gradients = gradients_of(model, batch)
    names = [f'{name}.weight' for name, module in model.named_modules() if hasattr(module, 'weight_quant')]
    names = [name for name in names if name in gradients]
    norm = torch.cat([gradients[name].flatten() for name in names]).norm()
    return {name: RHO * gradients[name] / norm for name in names}


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_second_pass_leaves_nothing(error: type[BaseException]) -> None:
    model = quantized('W4A4')
    wrapper = SAMOptimWrapper(slow_sgd(model), rho=RHO, perturb_quantized=True)
    before = parameters_of(model)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error('second pass')

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model.train_step(batches(1)[0], wrapper)
    handle.remove()
    after = parameters_of(model)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert not any(layer.weight_quant._forward_hooks for layer in map(model.get_submodule, LAYERS))


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = quantized('W4A4')
    (batch,) = batches(1)
    used = Multiplied(model.get_submodule('conv'))
    model.get_submodule('conv').weight.register_hook(lambda gradient: gradient * float('nan'))
    model.train_step(batch, SAMOptimWrapper(SGD(model.parameters(), lr=0.0), rho=RHO, perturb_quantized=True))
    first, second = used.seen
    assert torch.equal(first, second)


def test_a_float_model_is_refused() -> None:
    model = make(ToyNet)
    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.1), perturb_quantized=True)
    with pytest.raises(ValueError, match=r"perturb_quantized=True is for quantized models.*type='QuantizedModel'"):
        model.train_step(toys.batches(1)[0], wrapper)
