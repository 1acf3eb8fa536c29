"""What is compared: methods, SAM without this package, and a method's passes alone.

A method's name is its wrapper's without ``OptimWrapper``, in small letters: ``sam`` for ``SAMOptimWrapper``.
``NAME-VALUE`` sets the first argument of its own that has such a default: ``ausam-0.5`` is AUSAM with
``sampling_ratio=0.5``, ``esam-history`` ESAM with ``selection='history'``.

SAM by hand leaves out work: the second pass moves BatchNorm's statistics a second time, dropout draws other masks in
it, and nothing asks whether values are finite. The passes alone are the same inputs with the same gradients left out,
and the base optimizer's step: what a method's step takes more is the method's own work.
"""

from __future__ import annotations

import copy
import math
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from mm_sharp.config.preflight import check_wrappers, wrapper_class, wrapper_configs
from mm_sharp.errors import UsageError, arguments_of, closest, is_number
from mm_sharp.step.method import Cost
from mm_sharp.step.timing import StepTimer
from mm_sharp.step.wrapper import TwoPassOptimWrapper, registered_methods

# What every wrapper keeps of a config's; a step is a whole one, so accumulative_counts is not among them.
SHARED = ('optimizer', 'constructor', 'paramwise_cfg')
BY_HAND = 'sam by hand'
SUFFIX = ', passes alone'  # after a method's name


def all_methods() -> dict[str, str]:
    """The wrapper of the base optimizer and every registered sharpness-aware one, by name; the costliest first."""
    kinds = registered_methods()
    ordered = sorted(kinds, key=lambda name: -kinds[name].theoretical_cost(32).cycle)
    return {'base': 'OptimWrapper', **{kind.removesuffix('OptimWrapper').lower(): kind for kind in ordered}}


def parse_methods(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Type and arguments of each method's wrapper, by name, the base optimizer's first; a UsageError for others."""
    return {name: _parse_method(name) for name in ('base', *names)}


def _parse_method(name: str) -> dict[str, Any]:
    kinds = all_methods()
    if name in kinds:
        return {'type': kinds[name]}
    stem, _, text = name.partition('-')
    if stem in kinds and text:
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        kind = OPTIM_WRAPPERS.get(kinds[stem])
        choices = getattr(kind, 'choices', {})
        for argument, parameter in signature(kind).parameters.items():
            own, default = argument not in arguments_of(TwoPassOptimWrapper), parameter.default
            fits = type(default) is str or argument in choices if isinstance(value, str) else is_number(default)
            if own and fits and value in choices.get(argument, (value,)):
                return {'type': kinds[stem], argument: value}
    hint = f'; did you mean {close!r}?' if (close := closest(name, kinds)) else ''
    raise UsageError(f'--methods {name}: there are {", ".join(kinds)}, and NAME-VALUE, as ausam-0.5{hint}')


def wrapper_settings(cfg: Config, method: Mapping[str, Any], amp: str | None = None) -> dict[str, Any]:
    """The config of a method's optimizer wrapper.

    The config's own arguments are kept as far as the method has them and does not set them. Its precision, or ``amp``,
    holds for the base optimizer too: in float16 by ``AmpOptimWrapper``, in bfloat16, which needs no loss scaling, by
    ``dtype`` of a plain ``OptimWrapper``.

    Raises UsageError: The config has several optimizer wrappers, there is none of this type, or an argument is wrong.
    """
    if list(wrapper_configs(cfg)) != ['optim_wrapper']:
        raise UsageError(f'a step of several optimizer wrappers cannot be measured: {", ".join(wrapper_configs(cfg))}')
    given, kind = dict(cfg.optim_wrapper), method['type']
    dtype = amp or given.get('dtype')
    if dtype is None and issubclass(wrapper_class(cfg, 'optim_wrapper', given), AmpOptimWrapper):
        dtype = 'float16'
    if dtype is not None:
        given['dtype'] = dtype = str(dtype).removeprefix('torch.')
        kind = 'AmpOptimWrapper' if (kind, dtype) == ('OptimWrapper', 'float16') else kind
    known = {*arguments_of(OPTIM_WRAPPERS.get(kind)), *SHARED} - {'accumulative_counts'}
    kept = {key: value for key, value in given.items() if key in known}
    settings = copy.deepcopy({**kept, **method, 'type': kind})
    check_wrappers(Config({'default_scope': cfg.get('default_scope'), 'optim_wrapper': settings}))
    return settings if dtype is None else {**settings, 'dtype': dtype}


def theoretical_cost(settings: Mapping[str, Any], batch_size: int) -> Cost:
    """What a step costs in theory, given its wrapper's config, in steps of the base optimizer."""
    kind = OPTIM_WRAPPERS.get(settings['type'])
    return kind.theoretical_cost(batch_size, **settings) if issubclass(kind, TwoPassOptimWrapper) else Cost(1.0, 1.0)


def whole_cycles(rounds: int, costs: Mapping[str, Cost]) -> int:
    """At least so many rounds, in which every method's cycles are whole."""
    cycles = math.lcm(*(cost.length for cost in costs.values()))
    return -(-rounds // cycles) * cycles


@dataclass(frozen=True)
class Candidate:
    """A method with a model and an optimizer wrapper of its own."""

    name: str
    model: Any
    optim_wrapper: Any

    def step(self, batch: Any) -> dict[str, Any]:
        """One whole training step; returns what there is to log."""
        return dict(self.model.train_step(batch, self.optim_wrapper))

    def timed_step(self, batch: Any) -> StepTimer:
        """One whole training step, with marks at the ends of its phases."""
        wrapper = self.optim_wrapper
        if isinstance(wrapper, TwoPassOptimWrapper):
            wrapper.record_timing = True
            self.step(batch)
            wrapper.record_timing = False
            assert wrapper.last_step is not None and wrapper.last_step.timer is not None  # noqa: PT018
            return wrapper.last_step.timer
        timer = _started_timer()
        with wrapper.optim_context(self.model):
            loss, _ = loss_of(self.model, batch)
        wrapper.backward(wrapper.scale_loss(loss))
        timer.mark('pass1')
        wrapper.step()
        wrapper.zero_grad()
        timer.mark('step')
        return timer


def _started_timer() -> StepTimer:
    timer = StepTimer(torch.device(get_device()))
    timer.mark('start')
    return timer


def loss_of(model: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a batch and what there is to log, as MMEngine's ``train_step`` computes them."""
    loss, log = model.parse_losses(model._run_forward(model.data_preprocessor(batch, True), mode='loss'))
    return loss, dict(log)


@dataclass(frozen=True)
class HandWrittenSAM(Candidate):
    """SAM as many write it: a loop over the parameters, and a clone of each, made anew in every step."""

    rho: float  # in the place of the optimizer wrapper is the base optimizer

    def timed_step(self, batch: Any) -> StepTimer:
        """The restoration and the base optimizer's step are one phase."""
        timer = _started_timer()
        self.step(batch, timer.mark)
        return timer

    def step(self, batch: Any, mark: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """With marks after its phases."""
        loss, log = loss_of(self.model, batch)
        loss.backward()
        mark('pass1')
        before = self._perturb()
        mark('perturb')
        loss_of(self.model, batch)[0].backward()
        mark('pass2')
        with torch.no_grad():
            for parameter, weight in before:
                parameter.copy_(weight)
        self.optim_wrapper.step()
        self.model.zero_grad()
        mark('step')
        return log

    @torch.no_grad()
    def _perturb(self) -> list[tuple[Tensor, Tensor]]:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        before = [(parameter, parameter.clone()) for parameter in parameters]
        for parameter in parameters:
            parameter.add_(parameter.grad * (self.rho / (norm + 1e-12)))
        self.model.zero_grad()
        return before


def check_by_hand(settings: Mapping[str, Any]) -> None:
    """Refuse what SAM's config asks and :class:`HandWrittenSAM` does not know."""
    for key, known in (('dtype', (None, 'bfloat16')), ('clip_grad', (None,)), ('adaptive', (None, False))):
        if settings.get(key) not in known:
            hint = f'leave --peers out, or set --cfg-options optim_wrapper.{key}={known[-1]}'
            raise UsageError(f'--peers: SAM by hand knows no optim_wrapper.{key}={settings[key]!r}: {hint}')


class Pass(NamedTuple):
    """A forward pass: its inputs, whether it is differentiated, and which of the parameters are trained in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differentiated: bool
    trained: list[bool]


@dataclass(frozen=True)
class PassesOnly(Candidate):
    """A step of nothing but the passes that a method's step has just made, and the base optimizer's own step."""

    passes: list[Pass]  # of the method's model

    @classmethod
    def beside(cls, method: Candidate, model: Any, optim_wrapper: Any) -> PassesOnly:
        """What makes each pass of a method's again, with a model and an optimizer wrapper of its own."""
        passes: list[Pass] = []

        def note(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            trained = [parameter.requires_grad for parameter in own.parameters()]
            passes.append(Pass(args, kwargs, torch.is_grad_enabled(), trained))

        method.model.register_forward_hook(note, with_kwargs=True)
        return cls(method.name + SUFFIX, model, optim_wrapper, passes)

    def step(self, batch: Any) -> dict[str, Any]:
        """On the batches of the method's passes."""
        log: dict[str, Any] = {}
        for args, kwargs, differentiated, trained in self.passes:
            for parameter, is_trained in zip(self.model.parameters(), trained, strict=True):
                parameter.requires_grad_(is_trained)
            self.optim_wrapper.zero_grad()  # an earlier pass's gradients are of no use to this one
            with torch.set_grad_enabled(differentiated):
                loss, log = self.model.parse_losses(self.model(*args, **kwargs))
            if loss.requires_grad:
                loss.backward()
        self.passes.clear()
        self.optim_wrapper.optimizer.step()
        self.optim_wrapper.zero_grad()
        return dict(log)
