"""Calibration before training, once ``load_from`` is loaded, and the accuracy that it gives: a hook."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, MODELS
from mmengine.utils import track_iter_progress
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset

from mm_sharp.errors import HOOK, check_bool, check_positive_int
from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.rng import RandomState
from mm_sharp.step.optim_wrappers import optim_wrappers
from mm_sharp.step.wrapper import TwoPassOptimWrapper

from .calibration import calibrate, collapse_warning
from .export import warn_of_export
from .flow import without_quantizers
from .record import NotCalibratedError, is_calibrated, record_of
from .scale_decay import fit_groups

CHECKPOINT = 'post_training.pth'
# Shares of each tensor's norm: what was found right for quantized models (docs/results.md), and what is warned of.
_RHO, _LARGE_RHO = 0.005, 0.01


@HOOKS.register_module()
class CalibrationHook(Hook):  # type: ignore[misc]
    """Calibrate a quantized model before training and report its accuracy then: post-training quantization.

    Runs whose model is a ``QuantizedModel`` get one by themselves; it is in a config for other arguments. The batches
    are training batches, of samples drawn at random, but the same with the same seed. Training draws the same random
    numbers without it. On several ranks all hold rank 0's outcome. Runs that resume, or start from a quantized model's
    checkpoint, have nothing to calibrate.

    Args:
        num_batches: Batches of the training data loader's size.
        bias_correction: Correct biases afterwards; see :func:`mm_sharp.quantization.calibrate`.
        baseline: Evaluate on the validation set (if the run has one), log the metrics as ``post_training/…``, and save
            the model as ``post_training.pth`` in the work directory, to be tested, exported or trained further. Where
            little seems to be left of a trained model's accuracy, it is evaluated in float, too, and a warning says
            where to look.
    """

    priority = 'VERY_HIGH'  # before hooks that look at the weights when training starts

    def __init__(self, num_batches: int = 16, bias_correction: bool = False, baseline: bool = True) -> None:
        name = type(self).__name__
        self.num_batches = check_positive_int(name, 'num_batches', num_batches, example='16', form=HOOK)
        self.bias_correction = check_bool(name, 'bias_correction', bias_correction, HOOK)
        self.baseline = check_bool(name, 'baseline', baseline, HOOK)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Let runs resume that were begun when scales had weight decay; they go on with it."""
        saved = checkpoint.get('optimizer')
        if not runner._resume or runner._has_loaded or not isinstance(saved, dict):
            return
        for name, member in optim_wrappers(runner.optim_wrapper).items():
            if isinstance(getattr(member, 'optimizer', None), Optimizer):
                fit_groups(member.optimizer, saved.get(name, {}) if name else saved)

    def before_train(self, runner: Any) -> None:
        """Calibrate, if the model is quantized and has not been calibrated; warn of the ``rho`` of a float model."""
        model = unwrap(runner.model)
        if record_of(model) is None:
            return
        for wrapper in optim_wrappers(runner.optim_wrapper).values():
            _warn_of_large_rho(wrapper)
        if is_calibrated(model):
            print_log('The quantizers have their scales from the checkpoint: nothing to calibrate', 'current')
            return
        if runner.iter > 0:
            raise NotCalibratedError(
                f'training resumes at iteration {runner.iter}, but the checkpoint has no scales of quantizers: it is '
                'not of this model. Start from it instead: load_from=…, without --resume'
            )
        state = RandomState.capture([next(model.parameters()).device])
        try:
            self._calibrate(runner, model)
            for hook in runner.hooks:  # EMAHook copied the model before weights and scales were there
                if isinstance(hook, EMAHook):
                    hook.ema_model = MODELS.build(hook.ema_cfg, default_args={'model': hook.src_model})
            if is_main_process():
                warn_of_export(model)
            if self.baseline:
                self._report(runner, model)
        finally:
            state.restore()

    def _calibrate(self, runner: Any, model: nn.Module) -> None:
        loader = some_batches(runner.train_dataloader, self.num_batches, runner.seed or 0)
        if runner._load_from is None:
            message = 'No load_from: the model that is quantized has random or pretrained weights only'
            print_log(message, 'current', logging.WARNING)
        print_log(f'Calibrating the quantizers on {len(loader)} training batches', 'current')
        calibrate(model, _with_bar(loader), bias_correction=self.bias_correction)
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast(tensor.detach(), src=0)

    def _report(self, runner: Any, model: nn.Module) -> None:
        runner.save_checkpoint(
            runner.work_dir, CHECKPOINT, save_optimizer=False, save_param_scheduler=False, by_epoch=False
        )
        if runner.val_loop is None:
            return
        loader, evaluator = runner.val_loop.dataloader, runner.val_loop.evaluator
        metrics = evaluate(runner.model, loader, evaluator)
        values = '  '.join(f'{name}: {value:.4f}' for name, value in metrics.items())
        print_log(f'Before training (post-training quantization, {CHECKPOINT}):  {values}', 'current')
        runner.visualizer.add_scalars({f'post_training/{name}': value for name, value in metrics.items()}, step=0)
        if runner._load_from is None:
            return  # there is no accuracy to lose

        def evaluate_float() -> dict[str, float]:
            with without_quantizers(model):
                return evaluate(runner.model, loader, evaluator)

        warning = collapse_warning(model, next(iter(loader)), metrics, evaluate_float)
        if warning:
            print_log(warning, 'current', logging.WARNING)


def _warn_of_large_rho(wrapper: Any) -> None:
    """Where a config adds quantization to a method's fragment, ``rho`` is still what serves float models."""
    if not isinstance(wrapper, TwoPassOptimWrapper) or wrapper.settings.adaptive != 'tensor':
        return
    if wrapper.rho > _LARGE_RHO:
        print_log(
            f"{type(wrapper).__name__}: rho={wrapper.rho:g} of each tensor's norm is large for a quantized model: "
            f'{_RHO} was found right. Unless you chose it for this model, write optim_wrapper = dict(rho={_RHO}). '
            'See docs/quantize_and_deploy.md',
            'current',
            logging.WARNING,
        )


@torch.no_grad()
def evaluate(model: Any, loader: Any, evaluator: Any) -> dict[str, float]:
    """A model's metrics that are numbers, without validation hooks, which would take them for those of an epoch."""
    training = model.training
    model.eval()
    print_log(f'Evaluating on {len(loader.dataset)} validation samples', 'current')
    for batch in _with_bar(loader):
        evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    metrics = evaluator.evaluate(len(loader.dataset))
    model.train(training)
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}


def some_batches(loader: DataLoader[Any], count: int, seed: int) -> DataLoader[Any]:
    """A data loader like the training's, but for its sampler: samplers count, and ``AUSAMSampler`` draws."""
    batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return DataLoader(
        Subset(loader.dataset, order[: count * batch_size].tolist()),
        batch_size=batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )


def _with_bar(loader: Any) -> Iterable[Any]:
    """The batches of a loader, with a progress bar on the main process."""
    return track_iter_progress((loader, len(loader))) if is_main_process() else loader  # type: ignore[no-any-return]
