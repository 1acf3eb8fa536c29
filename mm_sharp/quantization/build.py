"""A float model with Brevitas's layers in it: ``QuantizedModel`` (ours).

The model keeps its class, its ``train()`` and its parameters' names; convolutions, deconvolutions and fully connected
layers become Brevitas's, which quantize their input and their weights. That is Brevitas's layer-wise scheme: sums of
residual branches, concatenations and activations work on values that were just multiplied out, and are quantized where
the next layer takes them in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.graph.base import ModuleToModuleByInstance
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from mm_sharp.errors import UserError

from .float_outputs import FloatOutputs
from .flow import LAYERS, LayerFlow, trace_flow
from .folding import fold_batchnorms, has_hooks, unfolded_batchnorms
from .guard import watch_calls
from .layer_fixes import mend
from .loading import watch_loading
from .policy import OWNER, LayerPolicy, QuantizationPolicy
from .quantizers import input_quantizer, input_range, weight_quantizer
from .record import LAYOUT, LayerRecord, QuantizationRecord, size_in_bytes

_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.Linear: qnn.QuantLinear,
}


@MODELS.register_module(name='QuantizedModel')  # type: ignore[untyped-decorator]
def quantized_model(model: Any, policy: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Build a model and quantize it: ``QuantizedModel`` in configs.

    ``model=dict(type='QuantizedModel', model=dict(type='TopdownPoseEstimator', …), policy=dict(…))``, or, with the
    model's own keys where they were, ``model=dict(type='QuantizedModel', model='TopdownPoseEstimator', backbone=…,
    head=…, policy=dict(…))``; the fragments in ``_base_/quantization`` write the second form.

    Quantizers must be calibrated before the model is used: :class:`mm_sharp.quantization.CalibrationHook` does it in
    every run that trains one, and checkpoints of quantized models hold what it found.

    Args:
        model: Config of the float model, the name of its class, or the model itself.
        policy: See :class:`mm_sharp.quantization.policy.QuantizationPolicy`.
        **kwargs: With a name, the float model's arguments; with a config, keys that are set in it.

    Returns:
        The model, of the float model's class, with a record of the quantization as ``.quantization``.

    Raises:
        ValueError: The policy is not allowed, fits no layer, or the input's size is not known.
    """
    checked = QuantizationPolicy.from_config(policy)
    if not isinstance(model, nn.Module):
        config = {'type': model} if isinstance(model, str) else dict(model)
        model = MODELS.build({**config, **kwargs})
    elif kwargs:
        raise UserError(f'{OWNER}: {sorted(kwargs)} cannot be set in a model that is built already')
    return quantize(model, checked)


def quantize(model: nn.Module, policy: QuantizationPolicy) -> nn.Module:
    """Quantize a float model in place.

    Args:
        model: A model of MMEngine's kind, whose ``forward`` takes ``(inputs, data_samples, mode)``.
        policy: How.

    Returns:
        ``model``.

    Raises:
        ValueError: The policy's patterns match nothing, no layer would be quantized, the input's size is unknown, or
            the model computes something else than the float model did, quantizers apart.
    """
    if isinstance(getattr(model, 'quantization', None), QuantizationRecord):
        raise UserError(f'{OWNER}: the model is quantized already')
    _check_patterns(model, policy)  # before anything is changed
    float_bytes = size_in_bytes(model)
    _make_plain(model)
    size = _input_size(model, policy)
    noise = _noise(model, size)
    flows = trace_flow(model, noise)
    outputs = FloatOutputs(model, noise)
    pairs = {name: flow.batchnorm for name, flow in flows.items() if flow.batchnorm}
    folded: list[str] = []
    unfolded: dict[str, str] = {}
    if policy.fold_batchnorm:
        folded, unfolded = fold_batchnorms(model, pairs), unfolded_batchnorms(model, pairs)
    places = _places(model)
    layers = [
        _quantize_layer(name, module, places[module], flows.get(name), policy)
        for name, module in list(model.named_modules())
        if isinstance(module, LAYERS)
    ]
    _check_any(layers)
    weights = sum(4 * layer.weights for layer in layers if layer.policy is not None)
    outputs.check(model, {layer: norm for layer, norm in pairs.items() if norm in folded})
    record = QuantizationRecord(policy, layers, folded, float_bytes, 0, size, unfolded=unfolded)
    model.quantization = record  # type: ignore[assignment]
    model.register_buffer(LAYOUT, record.layout())
    record.other_bytes = _full_size(model) - weights
    watch_loading(model)
    watch_calls(model)
    print_log(f'Quantized {type(model).__name__}:\n{record.table()}', logger='current', level=logging.INFO)
    return model


def _quantize_layer(
    name: str,
    module: nn.Module,
    places: Iterable[tuple[nn.Module, str]],
    flow: LayerFlow | None,
    policy: QuantizationPolicy,
) -> LayerRecord:
    """Replace one layer, or say why not."""
    kind, weights = type(module).__name__, module.weight.numel()  # type: ignore[operator]
    chosen: LayerPolicy | str
    if type(module) not in _QUANTIZED:
        chosen = f'{kind} has a forward of its own'
    elif has_hooks(module):
        chosen = f'{kind} has hooks, as weight normalisation is one'
    elif flow is None:
        chosen = 'not called in inference'
    else:
        chosen = policy.of_layer(name, first=flow.first, last=flow.last)
    if isinstance(chosen, str) or flow is None:
        return LayerRecord(name, kind, None, '', str(chosen), weights)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)) and module.groups > 1:
        chosen = replace(chosen, weight_granularity='tensor')  # Brevitas has no scales for channels of these
    replace_layer(module, places, chosen, nonnegative=flow.nonnegative)
    return LayerRecord(name, kind, chosen, input_range(chosen, nonnegative=flow.nonnegative), '', weights)


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The modules that hold each layer, and its name there: a model may have one layer under several names."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, LAYERS):
                places.setdefault(child, []).append((parent, name))
    return places


def replace_layer(
    module: nn.Module, places: Iterable[tuple[nn.Module, str]], policy: LayerPolicy, *, nonnegative: bool
) -> None:
    """Put Brevitas's layer in a float layer's places, with its weights.

    The scales of a layer that is not trained (a frozen stage's) are not trained either: models that freeze their stages
    whenever they enter training mode would do it then, too late for the optimizer and for DDP.
    """
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    # Not its `apply`, which searches the model for the layer, and that for each of hundreds.
    layer = ModuleToModuleByInstance(
        module,
        _QUANTIZED[type(module)],
        weight_quant=weight_quantizer(policy),
        input_quant=input_quantizer(policy, nonnegative=nonnegative),
        bias_quant=None,
        return_quant_tensor=False,
    ).init_new_module(module)
    for name, parameter in layer.named_parameters():
        fixed = policy.act_scales == 'fixed' and name.startswith('input_quant.')
        parameter.requires_grad_(trained.get(name, trained['weight'] and not fixed))
    layer.train(module.training)
    mend(layer)
    for parent, name in places:
        setattr(parent, name, layer)


def _make_plain(model: nn.Module) -> None:
    """Make mmcv's wrappers of layers, which add nothing on torch of today, the plain layers that they wrap."""
    for module in model.modules():
        if isinstance(module, LAYERS) and type(module).__module__ == 'mmcv.cnn.bricks.wrappers':
            module.__class__ = next(  # type: ignore[assignment]
                base for base in type(module).__mro__ if base in _QUANTIZED
            )


def _input_size(model: nn.Module, policy: QuantizationPolicy) -> tuple[int, int]:
    if policy.input_size is not None:
        return policy.input_size
    decoder = getattr(getattr(model, 'head', None), 'decoder', None)
    size = getattr(decoder, 'input_size', None)
    if size is None:
        raise UserError(
            f'{OWNER}: the size of the input is not known (the model has no codec that says it): write '
            'policy=dict(input_size=(width, height), …)'
        )
    return int(size[0]), int(size[1])


def _noise(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """(1, C, H, W): any values will do, since only the graph is read; no global random number is drawn."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    channels = 3 if mean is None else mean.numel()
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    noise = torch.randn(1, channels, size[1], size[0], generator=generator)
    return noise.to(parameter.device, parameter.dtype)


def _full_size(model: nn.Module) -> int:
    """Bytes of what a calibrated model's checkpoint holds, but for the layout."""
    names = model.state_dict().keys() - {LAYOUT}  # not buffers of quantizers or the data preprocessor
    saved = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in names)]
    return sum(tensor.numel() * tensor.element_size() for tensor in saved)


def _check_patterns(model: nn.Module, policy: QuantizationPolicy) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    unused = policy.unused_patterns(names)
    if unused:
        raise UserError(
            f'{OWNER}: policy patterns {unused} match no layer; there are {", ".join(names)}. '
            f"Write for example: policy=dict(skip=['{names[0] if names else 'conv1'}'], …)"
        )


def _check_any(layers: list[LayerRecord]) -> None:
    if not any(layer.policy for layer in layers):
        reasons = '; '.join(f'{layer.name}: {layer.reason}' for layer in layers[:5])
        raise UserError(
            f'{OWNER}: no layer is quantized ({reasons or "the model has none"}). Write for example: '
            'policy=dict(first_layers=8, last_layers=8, skip=[]), or sharp_quantization = None to train in float'
        )
