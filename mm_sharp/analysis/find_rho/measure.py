"""A short training of a config's model, and the rises of its batches' losses at several radii.

The training is the config's own, with its optimizer, schedule, data and hooks, but with the base optimizer's steps: so
the outcome does not depend on the ``rho`` that is written there, and half of the time is saved. Nothing of it is kept.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from mm_sharp.analysis.prepare import prepared
from mm_sharp.cli.loading import careful_loading
from mm_sharp.cli.process import build_runner
from mm_sharp.config.preflight import type_name, wrapper_class, wrapper_configs
from mm_sharp.errors import RECOMMENDED_SCALE, UsageError, arguments_of
from mm_sharp.hooks.scale import Scale, scale_of
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.step.method import Method
from mm_sharp.step.wrapper import TwoPassOptimWrapper

# From a tenth of the config's rho to ten times it.
FACTORS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)
_STEPS = 200  # of training, or half of all, if that is less
# What chooses the perturbation of a step; other answers than SAM's are not measured.
_CHOICES = ('select_parameters', 'direction', 'perturbation_gradient', 'perturb_along')
_ROUNDING = (
    "rounding has no derivative: the linearity is of the straight-through estimator's gradient, and need not be near 1 "
    'for any rho; find rho with the float config'
)


@dataclass(frozen=True)
class BatchRises:
    """What was found on one batch."""

    loss: float  # L(w)
    slope: float  # inner product of e and g over rho: the rise for each unit of rho, were the loss linear
    rises: list[float]  # L(w + e) - L(w) at each radius
    scale: Scale  # of the perturbation at the first radius, by part of the model; at the others in proportion


class _MeasuredError(Exception):
    """Ends a step in which all was measured; the step then puts everything back, as after any error."""

    def __init__(self, rises: BatchRises | None) -> None:
        self.rises = rises


class RhoProbe(TwoPassOptimWrapper):
    """An optimizer wrapper that measures SAM's perturbation at a grid of radii, each above 0, and never steps."""

    def __init__(self, optimizer: Optimizer, rhos: Sequence[float], **kwargs: Any) -> None:
        super().__init__(optimizer, rho=rhos[0], **kwargs)
        self._rhos = rhos
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def measure(self, model: Any, batch: Any) -> BatchRises | None:
        """Measure one batch as it comes from the loader; None if the gradient is not finite, or zero.

        The model is afterwards as it was, bit for bit. A UsageError: it makes no step with the wrapper it is given.
        """
        try:
            model.train_step(batch, self)
        except _MeasuredError as measured:
            return measured.rises
        finally:
            self._gradients = []
        raise UsageError(f'{type(model).__name__}: its train_step makes no step that could be measured')

    def perturbation_gradient(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], inverse_scale: Tensor | None
    ) -> None:
        """Keep the gradient, which the perturbation at the first radius is going to overwrite."""
        if not self._gradients:
            self._gradients = [(p, g.clone()) for p, g in zip(parameters, gradients, strict=True)]

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> NoReturn:
        """L(w + e) at each radius; ends the step."""
        if not self._gradients or not torch.isfinite(norm) or not norm:
            raise _MeasuredError(None)
        ascent, before, rises = self._two_pass.ascent, float(loss.detach()), []
        scale = None
        for rho in self._rhos:
            self.rho = rho
            for parameter, gradient in self._gradients:
                parameter.grad = gradient.clone()
            ascent.restore()
            ascent.perturb(self, loss.device, measures=scale is None)
            if scale is None:
                sizes = ascent.sizes(loss.device)
                assert sizes is not None
                scale = scale_of(sizes, self._two_pass.parallel.module)
            rises.append(float(self.second_pass.loss_without_gradient(call)) - before)
        assert scale is not None
        raise _MeasuredError(BatchRises(before, scale.slope / self._rhos[0], rises, scale))


@dataclass(frozen=True)
class Perturbation:
    """The perturbation that is measured."""

    arguments: dict[str, Any]  # of the wrapper, ``rho`` apart
    own: float | None  # the config's ``rho``; None if it has no sharpness-aware wrapper
    remark: str = ''  # what the config's method does otherwise, and what quantizers do to the linearity

    def rhos(self) -> list[float]:
        """The grid, if none is asked for."""
        centre = self.own or RECOMMENDED_SCALE['rho']
        return [float(f'{centre * factor:.3g}') for factor in FACTORS]


def perturbation_of(cfg: Config) -> Perturbation:
    """What a config says of the perturbation; a UsageError if it has several optimizer wrappers, or a strategy."""
    if cfg.get('strategy'):
        raise UsageError("rho is found in one process: leave the config's strategy out, by --cfg-options strategy=None")
    names = list(wrapper_configs(cfg))
    if names != ['optim_wrapper']:
        raise UsageError(f'the rho of several optimizer wrappers cannot be found: {", ".join(names)}')
    rounding = _ROUNDING if type_name(cfg.model.get('type')) == 'QuantizedModel' else ''
    given = cfg.optim_wrapper
    cls = wrapper_class(cfg, 'optim_wrapper', given)
    if not issubclass(cls, TwoPassOptimWrapper):
        arguments = {key: value for key, value in RECOMMENDED_SCALE.items() if key != 'rho'}
        if issubclass(cls, AmpOptimWrapper):
            arguments['dtype'] = given.get('dtype') or 'float16'
        return Perturbation(arguments, None, rounding)
    known = arguments_of(TwoPassOptimWrapper).keys() - {'optimizer', 'rho', 'accumulative_counts', 'clip_grad'}
    arguments = {name: copy.deepcopy(value) for name, value in given.items() if name in known}
    own = float(given.get('rho', arguments_of(cls)['rho'].default))
    others = any(getattr(cls, name) is not getattr(Method, name) for name in _CHOICES)
    remark = f"{cls.__name__} chooses its perturbation otherwise: what was measured is SAM's of the same rho"
    return Perturbation(arguments, own, '\n'.join(filter(None, (remark * others, rounding))))


def measure(
    cfg: Config, perturbation: Perturbation, rhos: Sequence[float], steps: int | None, batches: int, trust: bool
) -> tuple[list[BatchRises], int]:
    """Train for ``steps`` steps (None: 200 or half of the training), and measure ``batches`` training batches.

    Returns what was found on each batch whose gradient is finite and not zero, and the number of steps. A UsageError:
    there is no such batch; or the training has no more than ``steps`` steps.
    """
    with tempfile.TemporaryDirectory() as folder, careful_loading(trust), prepared(cfg):
        runner = build_runner(training_config(cfg, folder))
        with tqdm(leave=False, disable=None, mininterval=0.5) as bar:
            hook = _MeasuringHook(perturbation, rhos, steps, batches, bar)
            runner.register_hook(hook, 'LOWEST')
            with suppress(_DoneError):
                runner.train()
    if not hook.found:
        raise UsageError(f'in none of {batches} batches the gradient is finite and not 0: there is no perturbation')
    return hook.found, hook.steps


def training_config(cfg: Config, folder: str) -> Config:
    """The config, but training with the base optimizer, without validation, and saving nothing."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir, cfg.resume = folder, False
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': None}
    loader = cfg.train_dataloader
    if type_name((loader.get('batch_sampler') or {}).get('type')) == 'AUSAMSampler':
        loader.drop_last = loader.pop('batch_sampler').get('drop_last', False)
    if issubclass(wrapper_class(cfg, 'optim_wrapper', cfg.optim_wrapper), TwoPassOptimWrapper):
        names = {*arguments_of(TwoPassOptimWrapper), 'constructor', 'paramwise_cfg', '_scope_'}
        kept = {name: value for name, value in cfg.optim_wrapper.items() if name in names}
        # One optimizer step, the first, has two passes, without a perturbation; the others are the base optimizer's.
        cfg.optim_wrapper = {**kept, 'type': 'SAMOptimWrapper', 'rho': 0.0, 'interval': 2**31 - 1}
    return cfg


class _DoneError(Exception):
    """Ends the training."""


class _MeasuringHook(Hook):  # type: ignore[misc]
    def __init__(
        self, perturbation: Perturbation, rhos: Sequence[float], steps: int | None, batches: int, bar: Any
    ) -> None:
        self._perturbation, self._rhos, self._batches, self._bar = perturbation, rhos, batches, bar
        self._asked, self.steps, self.found = steps, 0, list[BatchRises]()

    def before_train(self, runner: Any) -> None:
        """Settle when to measure."""
        self.steps = min(_STEPS, runner.max_iters // 2) if self._asked is None else self._asked
        if self.steps >= runner.max_iters:
            raise UsageError(f'--steps {self.steps}: it must be below {runner.max_iters}, the steps of the training')
        self._bar.reset(total=self.steps + self._batches)
        self._bar.set_description('training')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Measure if it is time."""
        if runner.iter < self.steps:
            self._bar.update()
            return
        self._bar.set_description('measuring')
        probe = RhoProbe(runner.optim_wrapper.optimizer, self._rhos, **self._perturbation.arguments)
        # Begun again, a loader with persistent workers ends MMEngine's InfiniteSampler for good.
        by_iterations = isinstance(runner.train_loop, IterBasedTrainLoop)
        loaded = runner.train_loop.dataloader_iterator if by_iterations else _endless(runner.train_dataloader)
        for number, batch in enumerate(itertools.islice(loaded, self._batches)):
            torch.manual_seed(runner.seed + number)  # each measurement puts the random state back
            rises = probe.measure(runner.model, batch)
            self.found += [] if rises is None else [rises]
            self._bar.update()
        raise _DoneError


def _endless(loader: Any) -> Iterator[Any]:
    for epoch in itertools.count(1):
        if hasattr(loader.sampler, 'set_epoch'):
            loader.sampler.set_epoch(epoch)
        yield from loader
