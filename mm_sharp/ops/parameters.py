"""Which parameters an optimizer trains, and which of them are perturbed: the ``perturb`` argument.

What is left out is still trained, but stays where it is during the second pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from mm_sharp.errors import UserError

_SWITCHES = ('norm', 'bias', 'quantizer_scale')
_PATTERNS = ('include', 'exclude')
_IN_WORDS = {
    'auto': 'all that is trained; of a quantized model neither scales nor biases',
    'all': 'all that is trained',
    'weights': "weights; neither norm layers nor biases nor quantizers' scales",
}
_EXAMPLE = (
    "perturb='auto', perturb='all', perturb='weights' (no norm layers, biases or quantizer scales) or "
    "perturb=dict(norm=False, bias=True, quantizer_scale=False, include=['^backbone'], exclude=['head'])"
)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, each once: torch only warns where a group holds one twice."""
    found = {id(parameter): parameter for group in optimizer.param_groups for parameter in group['params']}
    return list(found.values())


def devices_of(optimizer: Optimizer) -> tuple[torch.device, ...]:
    """The devices of an optimizer's parameters, each once."""
    return tuple(dict.fromkeys(parameter.device for parameter in parameters_of(optimizer)))


class ParameterSelector:
    """Selects the parameters of an optimizer that take part in the perturbation.

    Args:
        owner: Class that takes the argument, for error messages.
        perturb: ``'all'``; ``'auto'``, all but, in a model with quantizers, their scales and every bias: of a few bits,
            a scale's perturbation can exceed the scale itself; ``'weights'``, which leaves out normalisation layers,
            biases and the scales of quantizers; or a dict with any of the switches ``norm`` (its biases included),
            ``bias`` and ``quantizer_scale`` (all True unless given) and of ``include`` and ``exclude``, regular
            expressions (one or a list): a parameter's name must match one of ``include``, if given, and none of
            ``exclude``.

    Attributes:
        scales: The scales of quantizers, perturbed or not, among the parameters that :meth:`select` was given last.
    """

    def __init__(self, owner: str, perturb: str | Mapping[str, object]) -> None:
        self._owner = owner
        self._perturb = perturb
        if perturb in ('all', 'auto'):
            perturb = {}
        elif perturb == 'weights':
            perturb = dict.fromkeys(_SWITCHES, False)
        if not isinstance(perturb, Mapping):
            raise self._error('it must be a string of these or a dict')
        unknown = set(perturb) - {*_SWITCHES, *_PATTERNS}
        if unknown:
            raise self._error(f'unknown keys {sorted(map(str, unknown))}')
        self._switches: dict[str, Any] = {name: perturb.get(name, True) for name in _SWITCHES}
        for name, value in self._switches.items():
            if not isinstance(value, bool):
                raise self._error(f'{name}={value!r} must be True or False')
        self._include = self._compile('include', perturb.get('include'))
        self._exclude = self._compile('exclude', perturb.get('exclude'))
        self._cached_for: tuple[int, ...] = ()
        self._selected: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []

    @property
    def takes_all(self) -> bool:
        """Whether no parameter of a model without quantizers is left out."""
        return all(self._switches.values()) and not self._include and not self._exclude

    @property
    def in_words(self) -> str:
        """What is perturbed, for the log."""
        if isinstance(self._perturb, str):
            return f'{_IN_WORDS[self._perturb]} (perturb={self._perturb!r})'
        return f'what perturb={dict(self._perturb)!r} allows'

    def select(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those of an optimizer's ``parameters`` that are perturbed, by their names and layers in ``model``, in order.

        One that ``model`` does not hold has no name: only ``include`` can leave it out.
        """
        key = (id(model), *map(id, parameters))
        if key != self._cached_for:
            kinds = _kinds(model)
            self._selected = self._apply(model, parameters, kinds)
            self.scales = [parameter for parameter in parameters if kinds.get(id(parameter)) == 'quantizer_scale']
            self._cached_for = key
        return self._selected

    def _apply(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], kinds: Mapping[int, str]
    ) -> list[nn.Parameter]:
        names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
        spared = self._perturb == 'auto' and 'quantizer_scale' in kinds.values()
        for key, patterns in (('include', self._include), ('exclude', self._exclude)):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names.values()):
                    raise self._error(f'{key} pattern {pattern.pattern!r} matches no parameter of the model')
        selected = []
        for parameter in parameters:
            kind, name = kinds.get(id(parameter)), names.get(id(parameter), '')
            switched_off = kind is not None and not self._switches[kind]
            if switched_off or (spared and (kind == 'quantizer_scale' or _is_bias(name))):
                continue
            included = not self._include or any(pattern.search(name) for pattern in self._include)
            if included and not any(pattern.search(name) for pattern in self._exclude):
                selected.append(parameter)
        if not selected:
            raise self._error('it leaves no parameter to perturb')
        return selected

    def _compile(self, name: str, value: object) -> list[re.Pattern[str]]:
        if value is None:
            return []
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise self._error(f'{name}={value!r} must be a regular expression or a list of them')
        try:
            return [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise self._error(f'{name}={value!r} is not a regular expression ({error})') from error

    def _error(self, reason: str) -> UserError:
        return UserError(f'{self._owner}: perturb={self._perturb!r} is not allowed: {reason}. Write {_EXAMPLE}')


def plain_name(name: str) -> str:
    """``name`` without what FSDP's and activation checkpointing's wrappers put in."""
    return re.sub(r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.', '', name)


def _is_bias(name: str) -> bool:
    last = name.rpartition('.')[2]  # torch's recurrent layers have bias_ih_l0, its attention bias_k
    return last == 'bias' or last.startswith('bias_') or last.endswith('_bias')


def _kinds(model: nn.Module) -> dict[int, str]:
    """The switch for a parameter, by its ``id``, if there is one."""
    kinds: dict[int, str] = {}
    for prefix, module in model.named_modules():
        norm = is_norm_layer(module)
        for name, parameter in module.named_parameters(recurse=False):
            # Brevitas keeps the learned scales of every quantizer below a module called `tensor_quant`.
            if 'tensor_quant' in f'{prefix}.{name}':
                kinds[id(parameter)] = 'quantizer_scale'
            elif norm:
                kinds[id(parameter)] = 'norm'
            elif _is_bias(name):
                kinds[id(parameter)] = 'bias'
    return kinds


def is_norm_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer: by its class's name, for they share no base class."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return isinstance(module, _NormBase) or any(n.endswith(('Norm', 'Norm2d')) or n == 'GRN' for n in names)
