"""What a two-pass step cannot handle, found early and said clearly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.errors import UnsupportedError, UserError
from mm_sharp.ops.fsdp import Shards
from mm_sharp.ops.model_call import RIGHT_FORM, ModelCall, has_own_parse_losses, loss_of, unwrap
from mm_sharp.ops.module_tree import is_compiled
from mm_sharp.ops.quantized_perturbation import quantizes_weights
from mm_sharp.step.settings import StepSettings

_RIGHT_FORM = (
    f'{RIGHT_FORM}\n'
    'For a model that returns the loss as a tensor, the last line is: optim_wrapper.update_params(losses)'
)


def check_model(
    settings: StepSettings, model: nn.Module, shards: Shards | None, *, can_sync: bool, by_name: bool
) -> None:
    """Refuse models under which a step would be wrong or fail, with a NotImplementedError or a ValueError.

    ``can_sync``: whether the first pass's gradients can be averaged by DDP. ``by_name``: whether parameters are told
    apart.
    """
    owner = settings.owner
    check_step_is_not_compiled(owner, model)
    synced = settings.sync_perturbation and can_sync
    if not synced and any(getattr(part, 'static_graph', False) for part in (model, *model.children())):
        # DDP learns the static graph in its first backward pass, and fails if that one runs under no_sync().
        way_out = ', or set sync_perturbation=True (one more all-reduce a step)' if can_sync else ''
        raise UnsupportedError(
            f'{owner}: DDP with static_graph=True cannot run the first pass without synchronisation. Take '
            f'static_graph=True out of model_wrapper_cfg{way_out}'
        )
    if shards is not None:
        _check_shards(settings, shards, by_name)


def check_step_is_not_compiled(owner: str, model: nn.Module) -> None:
    """Refuse a ``train_step`` that is compiled: what optimizer wrappers do changes from step to step."""
    if is_compiled(model, 'train_step'):
        raise UnsupportedError(
            f"{owner}: torch.compile has got hold of the model's train_step, and with it of the optimizer wrapper. "
            "Compile what holds no loss: model.backbone.compile(), or write compile=True in the config of MMEngine's "
            'Runner, in which that is done'
        )


def check_compiled(owner: str, model: nn.Module, *, sees_losses: bool, switches: bool) -> None:
    """Refuse compiled modules of which a method needs more than their output."""
    inner = unwrap(model)
    whole = model is not inner and '_orig_mod' in model._modules
    if sees_losses and (whole or is_compiled(inner)):
        raise UnsupportedError(
            f'{owner}: torch.compile has got hold of the whole {type(inner).__name__}, whose losses cannot be seen '
            'from outside any more. Compile what holds no loss: model.backbone.compile(), or, in a config, compile=True'
        )
    names = [name or type(inner).__name__ for name, module in inner.named_modules() if is_compiled(module)]
    if switches and (whole or names):
        raise UnsupportedError(
            f'{owner}: with beta below 1 other tensors have gradients in every step, and torch.compile would compile '
            f'{", ".join(names) or type(inner).__name__} anew for each of them. Do not compile (compile=False), or '
            f"write optim_wrapper = dict(type='{owner}', beta=1.0, ...)"
        )


def _check_shards(settings: StepSettings, shards: Shards, by_name: bool) -> None:
    """Refuse arguments that do not go with how a model is sharded."""
    owner = settings.owner
    if settings.perturb_quantized:
        raise UnsupportedError(
            f'{owner}: perturb_quantized=True is not supported under FSDP, where a layer has its weight in a pass '
            'only. Take it out, or train with DDP'
        )
    if shards.flat and by_name:
        raise UserError(
            f'{owner} perturbs chosen parameters, but FSDP with use_orig_params=False has put them together: write '
            "model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True)"
        )
    norm_type: Any = (settings.clip_grad or {}).get('norm_type', 2)
    if float(norm_type) != 2.0:
        raise UserError(
            f'{owner}: clip_grad with norm_type={norm_type!r} is not supported under FSDP, where only the 2-norm of '
            'the whole gradient is taken: write clip_grad=dict(max_norm=1.0), or clip by value'
        )
    if shards.offloads and settings.accumulative_counts > 1:
        raise UserError(
            f'{owner}: accumulative_counts={settings.accumulative_counts} does not go with cpu_offload of FSDP, which '
            'cannot add up gradients there: write accumulative_counts=1 or cpu_offload=False'
        )


def require_call(owner: str, call: ModelCall | None, *, within: bool) -> ModelCall:
    """Return ``call``; a RuntimeError says how the forward is to be run if none was captured, or it is still open."""
    if within:
        raise RuntimeError(
            f'{owner}.update_params was called inside optim_context, which is for the first forward alone: what it '
            'switches off there would be off in the second pass, too. Call it behind it:\n' + _RIGHT_FORM
        )
    if call is None:
        raise RuntimeError(
            f'{owner}.update_params needs the forward pass that gave the loss, to run it again. Call the model '
            'that was handed to optim_context inside it, once for each update_params:\n' + _RIGHT_FORM
        )
    return call


def check_within(owner: str, method: str, within: bool) -> None:
    """Refuse ``backward`` and ``step`` called by hand, which would be the base optimizer's, without a perturbation."""
    if not within:
        raise RuntimeError(
            f'{owner}.{method} was called by hand: a sharpness-aware step has two backward passes, which only '
            'update_params can run. In place of backward, step and zero_grad write:\n' + _RIGHT_FORM
        )


def check_loss(owner: str, call: ModelCall, loss: Tensor) -> None:
    """Make sure that the second pass can compute the loss that the first was handed.

    A model's own ``parse_losses`` is not called for that: it may keep state, and was called once already.
    """
    if has_own_parse_losses(unwrap(call.model)):
        return
    with torch.no_grad():
        expected = loss_of(call, call.output).to(loss.device, loss.dtype)
    if loss.shape == expected.shape == () and loss.device.type == 'cpu' and loss.item() == expected.item():
        return
    tolerance = 1e-4 if loss.dtype in (torch.float32, torch.float64) else 1e-2
    if loss.shape != expected.shape or not torch.allclose(
        loss.detach(), expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True
    ):
        name = type(unwrap(call.model)).__name__
        raise UserError(
            f'{owner}: update_params was given a loss of {loss.detach().tolist()}, but parse_losses of the captured '
            f"forward of {name} gives {expected.tolist()}. The second pass can repeat only the model's own forward and "
            f'parse_losses: move what {name}.train_step does to the loss afterwards (weights, further terms) into '
            'its forward(..., mode="loss") or its parse_losses.'
        )


def check_perturbed(
    settings: StepSettings, model: nn.Module, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> None:
    """Refuse sparse gradients, or what stands for them, and to perturb quantized weights where there are none."""
    owner = settings.owner
    if settings.perturb_quantized and not any(quantizes_weights(module) for module in model.modules()):
        raise UserError(
            f'{owner}: perturb_quantized=True is for quantized models, and {type(model).__name__} has no layer with '
            "quantized weights: take it out, or build the model with type='QuantizedModel'"
        )
    pairs = zip(parameters, gradients, strict=True)
    sparse = {id(parameter) for parameter, g in pairs if g is not None and g.layout is not torch.strided}
    if sparse:
        names = [name for name, parameter in model.named_parameters() if id(parameter) in sparse]
        raise UnsupportedError(
            f'{owner}: the gradients of {names} are sparse, which the perturbation does not support. Build the layer '
            "with sparse=False, or leave it out: perturb=dict(exclude=['^NAME'])"
        )
