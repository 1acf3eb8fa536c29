"""What a two-pass step cannot handle, found early and said clearly (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_sharp.quantized_perturbation import quantizes_weights
from mm_sharp.replay import ModelCall, loss_of, unwrap
from mm_sharp.shards import Shards

if TYPE_CHECKING:
    from mm_sharp.two_pass import TwoPassOptimWrapper


def check_model(owner: str, model: nn.Module, synced: bool, *, can_sync: bool = True) -> None:
    """Refuse model wrappers under which the first pass would be wrong or fail.

    Args:
        owner: Class that asks, for the message.
        model: The model handed to ``optim_context``.
        synced: Whether DDP averages the first pass's gradients over the ranks.
        can_sync: Whether an argument would make it do so.

    Raises:
        NotImplementedError: ``model`` is wrapped by DDP with ``static_graph`` while the first pass is not synchronised.
    """
    if getattr(model, 'static_graph', False) and not synced:
        # DDP learns the static graph in its first backward pass, and fails if that one runs under no_sync().
        way_out = ', or set sync_perturbation=True (one more all-reduce a step)' if can_sync else ''
        raise NotImplementedError(
            f'{owner}: DDP with static_graph=True cannot run the first pass without synchronisation. Take '
            f'static_graph=True out of model_wrapper_cfg{way_out}'
        )


def check_shards(wrapper: TwoPassOptimWrapper, shards: Shards) -> None:
    """Refuse arguments that do not go with how a model is sharded.

    Args:
        wrapper: The optimizer wrapper.
        shards: Its model.

    Raises:
        NotImplementedError: Quantized weights are to be perturbed.
        ValueError: Parameters are to be told apart where FSDP1 hides them in flat ones, the gradient is to be clipped
            by another than the 2-norm, or gradients are to be accumulated in pieces on the CPU.
    """
    owner = type(wrapper).__name__
    if wrapper.perturb_quantized:
        raise NotImplementedError(
            f'{owner}: perturb_quantized=True is not supported under FSDP, where a layer has its weight in a pass '
            'only. Take it out, or train with DDP'
        )
    by_name = not wrapper.selector.takes_all or wrapper.skips_gradients
    if shards.flat and by_name:
        raise ValueError(
            f'{owner} perturbs chosen parameters, but FSDP with use_orig_params=False has put them together: write '
            "model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True)"
        )
    norm_type = (wrapper.clip_grad_kwargs or {}).get('norm_type', 2)
    if float(norm_type) != 2.0:
        raise ValueError(
            f'{owner}: clip_grad with norm_type={norm_type!r} is not supported under FSDP, where only the 2-norm of '
            'the whole gradient is taken: write clip_grad=dict(max_norm=1.0), or clip by value'
        )
    if shards.offloads and wrapper._accumulative_counts > 1:
        raise ValueError(
            f'{owner}: accumulative_counts={wrapper._accumulative_counts} does not go with cpu_offload of FSDP, which '
            'cannot add up gradients there: write accumulative_counts=1 or cpu_offload=False'
        )


def require_call(owner: str, call: ModelCall | None) -> ModelCall:
    """Return ``call``, or say how the forward pass is to be run.

    Args:
        owner: Class that asks, for the message.
        call: What was captured within ``optim_context``.

    Raises:
        RuntimeError: Nothing was.
    """
    if call is None:
        raise RuntimeError(
            f'{owner}.update_params needs the forward pass that gave the loss, to run it again. Call the model '
            'that was handed to optim_context inside it, once for each update_params:\n'
            '    with optim_wrapper.optim_context(model):\n'
            "        losses = model(inputs, data_samples, mode='loss')\n"
            '    optim_wrapper.update_params(model.parse_losses(losses)[0])'
        )
    return call


def check_loss(owner: str, call: ModelCall, loss: Tensor) -> None:
    """Make sure that the second pass can compute the loss that the first was handed.

    Args:
        owner: Class that asks, for the message.
        call: The captured forward.
        loss: The scalar handed to ``update_params``.

    Raises:
        ValueError: ``loss`` is not what ``parse_losses`` makes of the captured output.
    """
    with torch.no_grad():
        expected = loss_of(call, call.output).to(loss.device, loss.dtype)
    tolerance = 1e-4 if loss.dtype in (torch.float32, torch.float64) else 1e-2
    if loss.shape != expected.shape or not torch.allclose(
        loss.detach(), expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True
    ):
        name = type(unwrap(call.model)).__name__
        raise ValueError(
            f'{owner}: update_params was given a loss of {loss.detach().tolist()}, but parse_losses of the captured '
            f"forward of {name} gives {expected.tolist()}. The second pass can repeat only the model's own forward and "
            f'parse_losses: move what {name}.train_step does to the loss afterwards (weights, further terms) into '
            'its forward(..., mode="loss") or its parse_losses.'
        )


def check_perturbed(
    owner: str, model: nn.Module, parameters: Sequence[nn.Parameter], *, quantized: bool = False
) -> None:
    """Refuse gradients that have no dense perturbation, and the perturbation of quantized weights where there are none.

    Args:
        owner: Class that asks, for the message.
        model: Module that names the parameters.
        parameters: Parameters with a gradient.
        quantized: Whether quantized weights are to be perturbed.

    Raises:
        NotImplementedError: A gradient is sparse.
        ValueError: Quantized weights are to be perturbed, and the model has none.
    """
    if quantized and not any(quantizes_weights(module) for module in model.modules()):
        raise ValueError(
            f'{owner}: perturb_quantized=True is for quantized models, and {type(model).__name__} has no layer with '
            "quantized weights: take it out, or build the model with type='QuantizedModel'"
        )
    sparse = {id(p) for p in parameters if p.grad is not None and p.grad.layout != torch.strided}
    if sparse:
        names = [name for name, parameter in model.named_parameters() if id(parameter) in sparse]
        raise NotImplementedError(
            f'{owner}: the gradients of {names} are sparse, which the perturbation does not support. Build the layer '
            "with sparse=False, or leave it out: perturb=dict(exclude=['^NAME'])"
        )
