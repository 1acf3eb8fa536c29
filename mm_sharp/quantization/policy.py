"""How a model is to be quantized: the ``policy`` of a config, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm_sharp.errors import UserError, check_bool, check_choice


@dataclass(frozen=True)
class Target:
    """Where a runtime computes in integers only if activations are quantized beyond the inputs of layers.

    Args:
        outputs: What convolutions put out (behind a ReLU, if one follows), and what is computed from it on the way to
            further convolutions: sums, products, activations, pooled and concatenated pictures.
        skips: The other input of a residual sum, beside that which a layer has just computed.
        signed: All activations in int8 around 0, never in uint8.
        symmetric: Weights without zero points.
    """

    outputs: bool = False
    skips: bool = False
    signed: bool = False
    symmetric: bool = False


# docs/deployment.md has the rules' sources.
TARGETS = {
    'generic': Target(),
    'onnxruntime': Target(outputs=True),
    'openvino': Target(skips=True, symmetric=True),
    'tensorrt': Target(skips=True, signed=True),
}
OWNER = 'QuantizedModel'
_BITS = (8, 7, 6, 5, 4, 3, 2)
_ACT_BITS = (16, *_BITS)
_CHOICES: dict[str, tuple[Any, ...]] = {
    'weight_bit_width': _BITS,
    'act_bit_width': _ACT_BITS,
    'weight_granularity': ('channel', 'tensor'),
    'weight_scales': ('learned', 'statistics'),
    'act_scales': ('learned', 'fixed'),
    'weight_symmetric': (True, False),
    'act_symmetric': (True, False),
    'scale_init': ('mse', 'max'),
    'scale_gradients': ('plain', 'lsq'),
}
_PLAIN_KEYS = ('target', 'first_layers', 'last_layers', 'fold_batchnorm')
_MODEL_KEYS = (*_PLAIN_KEYS, 'skip', 'layers', 'input_size')
_EXAMPLE = "policy=dict(weight_bit_width=4, act_bit_width=4, last_layers=8, skip=['head.final_layer'])"
_LAYERS = "policy=dict(layers=[dict(pattern='^head', weight_bit_width=8)], …)"
_FORM = 'policy=dict({name}={example}, …)'


@dataclass(frozen=True)
class LayerPolicy:
    """How one convolution, deconvolution or fully connected layer is quantized.

    Args:
        weight_bit_width: Bits of a weight, 2 to 8.
        act_bit_width: Bits of the layer's input, 2 to 8, or 16.
        weight_granularity: One scale for each output ``'channel'``, or one for the whole ``'tensor'``.
        weight_scales: ``'learned'``: step sizes that start from statistics of the weights and are trained with them
            (LSQ); ``'statistics'``: the largest weight's size in every forward.
        act_scales: ``'learned'``, or ``'fixed'`` at what calibration found.
        weight_symmetric: Integers around 0 without a zero point, the lowest one left out: -1, 0 and 1 at 2 bits.
        act_symmetric: No zero point for inputs of either sign. Inputs that cannot be negative never have one.
        scale_init: What scales start from: ``'mse'``, the scale of least squared error (20 candidates), or ``'max'``,
            the largest weight and the 99.999th percentile of an input.
        scale_gradients: ``'lsq'``: an SGD step moves a scale as LSQ's does, by the learning rate times its gradient
            times g (:func:`mm_sharp.quantization.int_quant.lsq_factor`); ``'plain'``: as Brevitas has it.
    """

    weight_bit_width: int = 8
    act_bit_width: int = 8
    weight_granularity: str = 'channel'
    weight_scales: str = 'learned'
    act_scales: str = 'learned'
    weight_symmetric: bool = True
    act_symmetric: bool = True
    scale_init: str = 'mse'
    scale_gradients: str = 'plain'

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(OWNER, name, getattr(self, name), choices, _FORM)
        if self.weight_scales == 'statistics' and self.scale_init == 'mse':
            raise UserError(
                f"{OWNER}: policy weight_scales='statistics' with scale_init='mse' would search the scales in every "
                "step: write scale_init='max', or weight_scales='learned'"
            )
        if self.scale_gradients == 'lsq' and not (self.weight_symmetric and self.act_symmetric):
            raise UserError(
                f"{OWNER}: policy scale_gradients='lsq' is for scales without zero points: write "
                'policy=dict(weight_symmetric=True, act_symmetric=True, …)'
            )


@dataclass(frozen=True)
class QuantizationPolicy:
    """How a whole model is quantized.

    Args:
        default: How a layer is quantized unless the rest says otherwise.
        first_layers: What applies to layers that see the image: bits of weights and input (2 to 8), ``'float'``, or
            ``'same'`` as all others. 8 by default, since a network's two ends are the most sensitive.
        last_layers: The same for layers whose output no further layer takes in.
        overrides: Pairs of a pattern and what it changes. The last one that matches a layer's name counts, and goes
            before ``first_layers`` and ``last_layers``.
        skip: Patterns (regular expressions, searched in layers' names) of layers that stay in float.
        fold_batchnorm: Whether BatchNorm is folded into the layer directly before it: no batch statistics any more.
        input_size: Width and height of the input in pixels; needed only where the model's codec does not know it.
        target: The runtime that the model is for, which says where activations are quantized besides the inputs of
            layers, to 8 bits: ``'generic'`` (nowhere), ``'onnxruntime'``, ``'openvino'`` or ``'tensorrt'``.
    """

    default: LayerPolicy
    first_layers: int | str = 8
    last_layers: int | str = 8
    overrides: tuple[tuple[re.Pattern[str], LayerPolicy], ...] = ()
    skip: tuple[re.Pattern[str], ...] = ()
    fold_batchnorm: bool = True
    input_size: tuple[int, int] | None = None
    target: str = 'generic'

    @classmethod
    def from_config(cls, policy: Mapping[str, Any] | None) -> QuantizationPolicy:
        """Read the dict of a config; a ValueError names what is not allowed in it.

        Its keys are this class's, :class:`LayerPolicy`'s for ``default``, and ``layers`` for ``overrides``: a list of
        dicts with a ``pattern`` and keys of :class:`LayerPolicy`.
        """
        if not isinstance(policy, Mapping):
            raise UserError(f'{OWNER}: policy={policy!r} is not allowed: a dict, as {_EXAMPLE}')
        _check_keys('policy keys {}', policy, (*_CHOICES, *_MODEL_KEYS), _EXAMPLE)
        for name in ('first_layers', 'last_layers'):
            check_choice(OWNER, name, policy.get(name, 8), (*_BITS, 'same', 'float'), _FORM)
        check_choice(OWNER, 'target', policy.get('target', 'generic'), tuple(TARGETS), _FORM)
        check_bool(OWNER, 'fold_batchnorm', policy.get('fold_batchnorm', True), _FORM)
        default = LayerPolicy(**{key: policy[key] for key in _CHOICES if key in policy})
        layers, skip = policy.get('layers', ()), policy.get('skip', ())
        if not isinstance(layers, (list, tuple)):
            raise UserError(f'{OWNER}: policy layers={layers!r} is not allowed: a list, as {_LAYERS}')
        read = cls(
            default,
            overrides=tuple(_override(default, item) for item in layers),
            skip=tuple(_pattern('skip', item) for item in (skip if isinstance(skip, (list, tuple)) else [skip])),
            input_size=_size(policy.get('input_size')),
            **{key: policy[key] for key in _PLAIN_KEYS if key in policy},
        )
        read.check_target()
        return read

    def check_target(self) -> None:
        """Refuse what the target does not take."""
        layers = (self.default, *(layer for _, layer in self.overrides))
        if TARGETS[self.target].symmetric and not all(layer.weight_symmetric for layer in layers):
            raise UserError(
                f'{OWNER}: policy target={self.target!r} takes no zero points of weights: write '
                f"policy=dict(target={self.target!r}, weight_symmetric=True, …), or target='generic'"
            )
        if not TARGETS[self.target].signed:
            return
        ends = [replace(self.default, act_bit_width=e) for e in (self.first_layers, self.last_layers) if type(e) is int]
        for layer in (*layers, *ends):
            if (layer.act_bit_width, layer.act_symmetric, layer.weight_symmetric) != (8, True, True):
                raise UserError(
                    f'{OWNER}: policy target={self.target!r} takes inputs of 8 bits, and no zero points: write '
                    f'policy=dict(target={self.target!r}, act_bit_width=8, first_layers=8, last_layers=8, '
                    "act_symmetric=True, weight_symmetric=True, …), or target='generic'"
                )

    def of_layer(self, name: str, *, first: bool, last: bool) -> LayerPolicy | str:
        """How a layer is quantized, which sees the image or ends the network; or why it is not."""
        if any(pattern.search(name) for pattern in self.skip):
            return 'left out by the policy (skip)'
        matching = [layer for pattern, layer in self.overrides if pattern.search(name)]
        if matching:
            return matching[-1]
        ends = [value for value, here in ((self.first_layers, first), (self.last_layers, last)) if here]
        if 'float' in ends:
            return f'{"first" if first and self.first_layers == "float" else "last"} layer (policy)'
        bits = max((end for end in ends if isinstance(end, int)), default=None)
        return self.default if bits is None else replace(self.default, weight_bit_width=bits, act_bit_width=bits)

    def of_points(self) -> LayerPolicy:
        """How activations are quantized between layers, where the target needs it."""
        return replace(self.default, act_bit_width=8)

    def check_patterns(self, names: Sequence[str]) -> None:
        """Refuse patterns that match none of the layers' names."""
        patterns = [*self.skip, *(pattern for pattern, _ in self.overrides)]
        unused = [p.pattern for p in patterns if not any(p.search(name) for name in names)]
        if unused:
            example = f"policy=dict(skip=['{next(iter(names), 'conv1')}'], …)"
            there = ', '.join(names)
            raise UserError(f'{OWNER}: policy patterns {unused} match no layer; there are {there}. Write {example}')


def _override(default: LayerPolicy, item: object) -> tuple[re.Pattern[str], LayerPolicy]:
    if not isinstance(item, Mapping) or 'pattern' not in item or len(item) < 2:
        raise UserError(
            f'{OWNER}: policy layers={item!r} is not allowed: a dict with a pattern and what it changes, as {_LAYERS}'
        )
    changes = {key: value for key, value in item.items() if key != 'pattern'}
    _check_keys('keys {} in policy layers', changes, tuple(_CHOICES), _LAYERS)
    return _pattern('layers', item['pattern']), replace(default, **changes)


def _check_keys(what: str, given: Iterable[Any], allowed: tuple[str, ...], example: str) -> None:
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise UserError(f'{OWNER}: unknown {what.format(unknown)}; there are {", ".join(allowed)}. Write {example}')


def _pattern(name: str, pattern: object) -> re.Pattern[str]:
    fault = 'it is no text'
    try:
        if isinstance(pattern, str):
            return re.compile(pattern)
    except re.error as error:
        fault = str(error)
    raise UserError(f'{OWNER}: policy {name}={pattern!r} is no regular expression ({fault}). Write {_EXAMPLE}')


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value if isinstance(value, (list, tuple)) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        example = 'policy=dict(input_size=(192, 256), …)'
        raise UserError(f'{OWNER}: policy input_size={value!r} is not allowed: (width, height) in pixels, as {example}')
    return sides[0], sides[1]
