"""A float model with Brevitas's layers in it: ``QuantizedModel``.

The model keeps its class, its ``train()`` and its parameters' names. Convolutions, deconvolutions and fully connected
layers become Brevitas's, which quantize their input and their weights; residual sums, concatenations and activations
work on float values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from traceback import walk_tb
from typing import Any

import torch
from brevitas.graph.base import ModuleToModuleByInstance
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from mm_sharp.errors import UserError

from .flow import LAYERS, LayerFlow, float_output, is_rounding, noise_of, trace_flow, trace_graph
from .folding import fold_batchnorms, is_plain
from .layers import QUANTIZED
from .points import Point, covered, find_points, insert_points
from .policy import OWNER, TARGETS, LayerPolicy, QuantizationPolicy
from .quantizers import input_quantizer, input_range, repair, scale_gradients_as_lsq, weight_quantizer
from .record import LayerRecord, QuantizationRecord, attach, record_of, size_in_bytes


@MODELS.register_module(name='QuantizedModel')  # type: ignore[untyped-decorator]
def quantized_model(model: Any, policy: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Build a model and quantize it: ``QuantizedModel`` in configs.

    ``model=dict(type='QuantizedModel', model=dict(type='TopdownPoseEstimator', …), policy=dict(…))``, or, with the
    model's own keys where they were, ``model=dict(type='QuantizedModel', model='TopdownPoseEstimator', backbone=…,
    head=…, policy=dict(…))``; the fragments in ``_base_/quantization`` write the second form. The model must be
    calibrated before it is used: :class:`mm_sharp.quantization.CalibrationHook` does it in every run.

    Args:
        model: Config of the float model, the name of its class, or the model itself.
        policy: See :class:`mm_sharp.quantization.policy.QuantizationPolicy`.
        **kwargs: With a name, the float model's arguments; with a config, keys that are set in it.
    """
    checked = QuantizationPolicy.from_config(policy)
    if not isinstance(model, nn.Module):
        config = {'type': model} if isinstance(model, str) else dict(model)
        model = MODELS.build({**config, **kwargs})
    elif kwargs:
        raise UserError(f'{OWNER}: {sorted(kwargs)} cannot be set in a model that is built already')
    return quantize(model, checked)


def float_config(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The float model's config in that of a ``QuantizedModel``; others as they are."""
    if model.get('type') != 'QuantizedModel':
        return model
    inner = model['model'] if isinstance(model['model'], Mapping) else {'type': model['model']}
    return {**inner, **{key: value for key, value in model.items() if key not in ('type', 'model', 'policy')}}


def quantize(model: nn.Module, policy: QuantizationPolicy) -> nn.Module:
    """Quantize a float model, whose ``forward`` takes ``inputs, data_samples, mode``, in place, and return it.

    Raises:
        ValueError: The policy does not fit, or the model computes something else than before, quantizers apart.
    """
    if record_of(model) is not None:
        raise UserError(f'{OWNER}: the model is quantized already')
    policy.check_patterns([name for name, _ in _layers_of(model)])
    float_bytes = size_in_bytes(model.state_dict())
    for module in model.modules():  # mmcv's wrappers of layers add nothing on today's torch
        if isinstance(module, LAYERS) and type(module).__module__ == 'mmcv.cnn.bricks.wrappers':
            module.__class__ = next(base for base in type(module).__mro__ if base in QUANTIZED)  # type: ignore
    width, height = policy.input_size or _input_size(model)
    noise = noise_of(model, width, height)
    flows, output = _trace(model, noise)
    if TARGETS[policy.target].signed:
        flows = {name: replace(flow, nonnegative=False) for name, flow in flows.items()}
    pairs = {flow.batchnorm: name for name, flow in flows.items() if flow.batchnorm}
    batchnorms = fold_batchnorms(model, pairs) if policy.fold_batchnorm else {}
    chosen = {name: _choice(name, module, flows.get(name), policy) for name, module in _layers_of(model)}
    points, quantized_before = _points(model, noise, chosen, policy)
    layers = _replace_layers(model, flows, chosen, quantized_before)
    insert_points(model, points, policy.of_points())
    _check_output(model, noise, output)
    saved = model.state_dict()  # without buffers of quantizers or the data preprocessor, and without scales
    calibrated = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in saved}}
    other_bytes = size_in_bytes(calibrated) - sum(4 * layer.weights for layer in layers if layer.policy)
    between = {p.name: input_range(policy.of_points(), nonnegative=p.nonnegative) for p in points}
    record = QuantizationRecord(policy, layers, batchnorms, float_bytes, other_bytes, (width, height), between)
    attach(model, record)
    print_log(f'Quantized {type(model).__name__}:\n{record.table()}', 'current')
    return model


def _trace(model: nn.Module, noise: torch.Tensor) -> tuple[dict[str, LayerFlow], torch.Tensor]:
    """What the float model does with noise, and its output; a UserError if it does not run."""
    try:
        return trace_flow(model, noise), float_output(model, noise)
    except Exception as error:
        names = {module: name for name, module in model.named_modules()}
        inside = [frame.f_locals.get('self') for frame, _ in walk_tb(error.__traceback__)]
        (*_, name) = ['', *(names[module] for module in inside if isinstance(module, nn.Module) and module in names)]
        reason = ' '.join(str(error).split()) or 'no message'
        raise UserError(
            f'{OWNER}: {type(model).__name__} does not run on a picture {tuple(noise.shape)}: {name or "the model"}: '
            f'{type(error).__name__}: {reason}. Only models of pictures can be quantized: write '
            'sharp_quantization = None to train in float, or another policy=dict(input_size=(width, height), …)'
        ) from error


def _layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def _choice(name: str, module: nn.Module, flow: LayerFlow | None, policy: QuantizationPolicy) -> LayerPolicy | str:
    if not is_plain(module, tuple(QUANTIZED)):
        return f'{type(module).__name__} has hooks or a forward of its own'
    if flow is None:
        return 'not called in inference'
    chosen = policy.of_layer(name, first=flow.first, last=flow.last)
    grouped = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)) and module.groups > 1
    if grouped and not isinstance(chosen, str):
        return replace(chosen, weight_granularity='tensor')  # Brevitas has no scales for channels of these
    return chosen


def _points(
    model: nn.Module, noise: torch.Tensor, chosen: Mapping[str, LayerPolicy | str], policy: QuantizationPolicy
) -> tuple[list[Point], dict[str, Point]]:
    """What the target needs between layers; and the layers whose input is quantized by that alone."""
    target = TARGETS[policy.target]
    if not target.outputs and not target.skips:
        return [], {}
    # A second look at the model: now that BatchNorm is folded, what it put out is the layer's output.
    graph = trace_graph(model, noise)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, LayerPolicy)}
    points = find_points(graph, target, layers)
    before = covered(graph, points)
    # Fewer bits than the point's need a quantizer of their own.
    same = {name for name, layer in layers.items() if layer.act_bit_width == policy.of_points().act_bit_width}
    return points, {name: point for name, point in before.items() if name in same}


def _replace_layers(
    model: nn.Module,
    flows: Mapping[str, LayerFlow],
    chosen: Mapping[str, LayerPolicy | str],
    quantized_before: Mapping[str, Point],
) -> list[LayerRecord]:
    records: list[LayerRecord] = []
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in _layers_of(model):
        kind, weights, policy = type(module).__name__, module.weight.numel(), chosen[name]
        if isinstance(policy, str):
            records.append(LayerRecord(name, kind, None, '', policy, weights))
            continue
        point = quantized_before.get(name)
        nonnegative = flows[name].nonnegative if point is None else point.nonnegative
        inputs = None if point else input_quantizer(policy, nonnegative=nonnegative)
        replaced[module] = _quantized(module, policy, inputs)
        kept = input_range(policy, nonnegative=nonnegative)
        records.append(LayerRecord(name, kind, policy, kept, '', weights, point.name if point else ''))
    if not replaced:
        reasons = '; '.join(f'{layer.name}: {layer.reason}' for layer in records[:5])
        raise UserError(
            f'{OWNER}: no layer is quantized ({reasons or "the model has none"}). Write for example: '
            'policy=dict(first_layers=8, last_layers=8, skip=[]), or sharp_quantization = None to train in float'
        )
    replace_modules(model, replaced)
    return records


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of others, under each of their names, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _quantized(module: nn.Module, policy: LayerPolicy, inputs: Any) -> nn.Module:
    """Brevitas's layer with a float layer's weights. The scales of a layer that is not trained are not trained either:
    its model would freeze them on entering training mode, too late for the optimizer and for DDP.
    """
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    # Not its `apply`, which searches the model for the layer, and that for each of hundreds.
    layer: nn.Module = ModuleToModuleByInstance(
        module,
        QUANTIZED[type(module)],
        weight_quant=weight_quantizer(policy),
        input_quant=inputs,
        bias_quant=None,
        return_quant_tensor=False,
    ).init_new_module(module)
    for name, parameter in layer.named_parameters():
        fixed = policy.act_scales == 'fixed' and name.startswith('input_quant.')
        parameter.requires_grad_(trained.get(name, trained['weight'] and not fixed))
    repair(layer)
    if policy.scale_gradients == 'lsq':
        scale_gradients_as_lsq(layer)
    return layer.train(module.training)


def _input_size(model: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(getattr(model, 'head', None), 'decoder', None), 'input_size', None)
    if size is None:
        raise UserError(
            f'{OWNER}: the size of the input is not known (the model has no codec that says it): write '
            'policy=dict(input_size=(width, height), …), or sharp_quantization = None if the model takes no pictures'
        )
    return int(size[0]), int(size[1])


def _check_output(model: nn.Module, inputs: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a model that computes something else than the float model did, because it reads weights by itself, say."""
    fault, cause = 'changes more in its output than by rounding', None
    try:
        if is_rounding(float_output(model, inputs), expected):
            return
    except Exception as error:
        fault, cause = f'does not run ({type(error).__name__}: {error})', error
    raise UserError(
        f'{OWNER}: with BatchNorms folded and layers replaced the model {fault}: write '
        'policy=dict(fold_batchnorm=False, …), or leave layers out by policy=dict(skip=[…], …)'
    ) from cause
