"""How a model is to be quantized: the ``policy`` of a config, checked (ours).

No Brevitas here: :mod:`mm_sharp.quantization.quantizers` says which of its quantizers a policy means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mm_sharp.errors import UserError, check_bool, check_choice

OWNER = 'QuantizedModel'
_BIT_WIDTHS = range(2, 9)
_ENDS = ('same', 'float')
_EXAMPLE = "policy=dict(weight_bit_width=4, act_bit_width=4, last_layers=8, skip=['head.final_layer'])"
_LAYERS = "policy=dict(layers=[dict(pattern='^head', weight_bit_width=8)], …)"
_FORM = 'policy=dict({name}={example}, …)'


@dataclass(frozen=True)
class LayerPolicy:
    """How one convolution, deconvolution or fully connected layer is quantized.

    Args:
        weight_bit_width: Bits of a weight, 2 to 8.
        act_bit_width: Bits of the layer's input, 2 to 8.
        weight_granularity: One scale for each output ``'channel'``, or one for the whole ``'tensor'``.
        weight_scales: ``'learned'``: step sizes that start from statistics of the weights and are trained with them
            (as LSQ does, Esser et al. 2020, without its scaling of the step sizes' gradients); ``'statistics'``: the
            largest weight's size, computed anew from the weights in every forward pass.
        act_scales: ``'learned'``, or ``'fixed'`` at what calibration found.
        weight_symmetric: Integers around 0 without a zero point, the lowest one left out, so that at 2 bits a weight
            is -1, 0 or 1 step.
        act_symmetric: No zero point for inputs of either sign. Inputs that cannot be negative never have one: they are
            unsigned integers.
        scale_init: What scales start from: ``'mse'``, the scale of least squared error (20 candidates), or ``'max'``,
            the largest weight and the 99.999th percentile of an input.
    """

    weight_bit_width: int = 8
    act_bit_width: int = 8
    weight_granularity: str = 'channel'
    weight_scales: str = 'learned'
    act_scales: str = 'learned'
    weight_symmetric: bool = True
    act_symmetric: bool = True
    scale_init: str = 'mse'

    def __post_init__(self) -> None:
        for name in ('weight_bit_width', 'act_bit_width'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value not in _BIT_WIDTHS:
                raise UserError(
                    f'{OWNER}: policy {name}={value!r} is not allowed: an integer from 2 to 8, as {_EXAMPLE}'
                )
        for name, choices in (
            ('weight_granularity', ('channel', 'tensor')),
            ('weight_scales', ('learned', 'statistics')),
            ('act_scales', ('learned', 'fixed')),
            ('scale_init', ('mse', 'max')),
        ):
            check_choice(OWNER, name, getattr(self, name), choices, _FORM)
        check_bool(OWNER, 'weight_symmetric', self.weight_symmetric, _FORM)
        check_bool(OWNER, 'act_symmetric', self.act_symmetric, _FORM)
        if self.weight_scales == 'statistics' and self.scale_init == 'mse':
            raise UserError(
                f"{OWNER}: policy weight_scales='statistics' with scale_init='mse' would search the scales in every "
                "step: write scale_init='max', or weight_scales='learned'"
            )


@dataclass(frozen=True)
class QuantizationPolicy:
    """How a whole model is quantized.

    Args:
        default: How a layer is quantized unless the rest says otherwise.
        first_layers: What applies to layers that see the image: bits of weights and input (2 to 8), ``'float'``, or
            ``'same'`` as all others. 8 by default, as is common: a network's two ends are the most sensitive, and
            the image has 8 bits anyway.
        last_layers: The same for layers whose output no further layer takes in.
        overrides: Pairs of a pattern and what it changes. The last one that matches a layer's name counts, and goes
            before ``first_layers`` and ``last_layers``.
        skip: Patterns (regular expressions, searched in layers' names) of layers that stay in float.
        fold_batchnorm: Whether BatchNorm is folded into the layer before it, weights and statistics, where it follows
            one directly. What is folded has no batch statistics in training any more.
        input_size: Width and height of the input in pixels; needed only where the model's codec does not know it.
    """

    default: LayerPolicy
    first_layers: int | str = 8
    last_layers: int | str = 8
    overrides: tuple[tuple[re.Pattern[str], LayerPolicy], ...] = ()
    skip: tuple[re.Pattern[str], ...] = ()
    fold_batchnorm: bool = True
    input_size: tuple[int, int] | None = None

    @classmethod
    def from_config(cls, policy: Mapping[str, Any] | None) -> QuantizationPolicy:
        """Read the dict of a config.

        Args:
            policy: Keys of :class:`LayerPolicy`, and ``first_layers``, ``last_layers``, ``skip`` (a pattern or a list
                of them), ``fold_batchnorm``, ``input_size`` and ``layers``: a list of dicts with a ``pattern`` and
                keys of :class:`LayerPolicy`.

        Raises:
            ValueError: A key or value is not allowed; the message names it.
        """
        if not isinstance(policy, Mapping):
            raise UserError(f'{OWNER}: policy={policy!r} is not allowed: a dict, as {_EXAMPLE}')
        given = dict(policy)
        for name in ('first_layers', 'last_layers'):
            _check_end(name, given.get(name, 8))
        default = _layer_policy(LayerPolicy(), {k: given.pop(k) for k in _LAYER_KEYS if k in given})
        layers = given.pop('layers', ())
        if isinstance(layers, (Mapping, str)) or not isinstance(layers, Iterable):
            raise UserError(f'{OWNER}: policy layers={layers!r} is not allowed: a list, as {_LAYERS}')
        overrides = tuple(_override(default, item) for item in layers)
        skip = tuple(_pattern('skip', pattern) for pattern in _listed(given.pop('skip', ())))
        unknown = set(given) - {'first_layers', 'last_layers', 'fold_batchnorm', 'input_size'}
        if unknown:
            allowed = ', '.join([*_LAYER_KEYS, 'first_layers, last_layers, skip, layers, fold_batchnorm, input_size'])
            raise UserError(
                f'{OWNER}: unknown policy keys {sorted(map(str, unknown))}; there are {allowed}. Write {_EXAMPLE}'
            )
        check_bool(OWNER, 'fold_batchnorm', given.get('fold_batchnorm', True), _FORM)
        if given.get('input_size') is not None:
            given['input_size'] = _size(given['input_size'])
        return cls(default=default, overrides=overrides, skip=skip, **given)

    def of_layer(self, name: str, *, first: bool, last: bool) -> LayerPolicy | str:
        """What applies to a layer.

        Args:
            name: Its dotted name.
            first: Whether it sees the image.
            last: Whether no further layer takes its output in.

        Returns:
            How it is quantized, or why it is not.
        """
        if any(pattern.search(name) for pattern in self.skip):
            return 'left out by the policy (skip)'
        matching = [layer for pattern, layer in self.overrides if pattern.search(name)]
        if matching:
            return matching[-1]
        ends = [getattr(self, f'{end}_layers') for end, here in (('first', first), ('last', last)) if here]
        if 'float' in ends:
            return f'{"first" if first and self.first_layers == "float" else "last"} layer (policy)'
        bits = max((end for end in ends if isinstance(end, int)), default=None)
        return self.default if bits is None else replace(self.default, weight_bit_width=bits, act_bit_width=bits)

    def unused_patterns(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of the names."""
        names = list(names)
        patterns = [*self.skip, *(pattern for pattern, _ in self.overrides)]
        return [p.pattern for p in patterns if not any(p.search(name) for name in names)]


_LAYER_KEYS = tuple(field.name for field in fields(LayerPolicy))


def _layer_policy(base: LayerPolicy, changes: Mapping[str, Any]) -> LayerPolicy:
    return replace(base, **changes)


def _override(default: LayerPolicy, item: object) -> tuple[re.Pattern[str], LayerPolicy]:
    if not isinstance(item, Mapping) or 'pattern' not in item or len(item) < 2:
        raise UserError(
            f'{OWNER}: policy layers={item!r} is not allowed: a dict with a pattern and what it changes, as '
            "dict(pattern='^head', weight_bit_width=8)"
        )
    changes = {key: value for key, value in item.items() if key != 'pattern'}
    unknown = set(changes) - {*_LAYER_KEYS}
    if unknown:
        allowed = ', '.join(_LAYER_KEYS)
        raise UserError(
            f'{OWNER}: unknown keys {sorted(unknown)} in policy layers; there are {allowed}. Write {_LAYERS}'
        )
    return _pattern('layers', item['pattern']), _layer_policy(default, changes)


def _pattern(name: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError(f'{OWNER}: policy {name}={pattern!r} is not allowed: a regular expression, as {_EXAMPLE}')
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'{OWNER}: policy {name}={pattern!r} is no regular expression ({error}). Write {_EXAMPLE}'
        ) from error


def _listed(patterns: object) -> Iterable[object]:
    return patterns if isinstance(patterns, (list, tuple)) else [patterns]


def _check_end(name: str, value: object) -> None:
    ok = value in _ENDS if isinstance(value, str) else type(value) is int and value in _BIT_WIDTHS
    if not ok:
        raise UserError(
            f"{OWNER}: policy {name}={value!r} is not allowed: bits (2 to 8), 'float', or 'same' as the "
            f'other layers, as {_EXAMPLE}'
        )


def _size(value: object) -> tuple[int, int]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(type(side) is int and side > 0 for side in value)
    ):
        example = 'policy=dict(input_size=(192, 256), …)'
        raise UserError(f'{OWNER}: policy input_size={value!r} is not allowed: (width, height) in pixels, as {example}')
    return (value[0], value[1])
