"""Calibration before training, and the accuracy that it gives: a hook (ours).

Order in a Runner: the model is built quantized, the checkpoint of ``load_from`` is loaded, then, in ``before_train``,
this hook calibrates; then training starts. Runs that resume, or start from a quantized model's checkpoint, have nothing
to calibrate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from numbers import Real
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.utils import ProgressBar
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset

from mm_sharp.errors import HOOK, check_bool, check_positive_int
from mm_sharp.ops.rng import RandomState
from mm_sharp.step.optim_wrappers import optim_wrappers

from .calibration import calibrate
from .collapse import Collapse
from .exportable import warn_of_export
from .float_outputs import without_quantizers
from .guard import NotCalibratedError, is_calibrated, record_of
from .scale_decay import decaying_scales, fit_groups

CHECKPOINT = 'post_training.pth'


@HOOKS.register_module()
class CalibrationHook(Hook):  # type: ignore[misc]
    """Calibrate a quantized model before training and report its accuracy then: post-training quantization.

    Runs whose model is a ``QuantizedModel`` get one by themselves; it is in a config for other arguments than the
    defaults. In other runs it does nothing.

    The batches are training batches, of samples drawn at random (but the same in every run with the same seed); the
    random state of the training that follows does not depend on it. On several ranks all hold rank 0's outcome.

    Args:
        num_batches: Batches of the training data loader's size.
        bias_correction: Correct biases afterwards; see :func:`mm_sharp.quantization.calibrate`.
        baseline: Evaluate on the validation set (if the run has one), log the metrics as ``post_training/…``, and save
            the model as ``post_training.pth`` in the work directory, to be tested, exported or trained further. Where
            little seems to be left of a trained model's accuracy, it is evaluated in float, too, and a warning says
            where to look.

    Raises:
        ValueError: An argument is out of range.
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
        """Calibrate, if the model is quantized and has not been calibrated.

        Raises:
            NotCalibratedError: Training is resumed from a checkpoint without scales.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if record_of(model) is None:
            return
        decaying = decaying_scales(runner.optim_wrapper, model)
        if decaying:
            _say(
                f'{len(decaying)} scales of quantizers have weight decay, which pulls them towards 0 (the first is '
                f'{decaying[0]}), as the config, the optimizer or the checkpoint that is resumed has it',
                logging.WARNING,
            )
        if is_calibrated(model):
            _say('The quantizers have their scales from the checkpoint: nothing to calibrate')
            return
        if runner.iter > 0:
            raise NotCalibratedError(
                f'training resumes at iteration {runner.iter}, but the checkpoint has no scales of quantizers: it is '
                'not of this model. Start from it instead: load_from=…, without --resume'
            )
        state = RandomState.capture([next(model.parameters()).device])
        try:
            self._calibrate(runner, model)
            _renew_averages(runner)
            if is_main_process():
                warn_of_export(model)
            if self.baseline:
                self._report(runner)
        finally:
            state.restore()

    def _calibrate(self, runner: Any, model: nn.Module) -> None:
        loader = _some_batches(runner.train_dataloader, self.num_batches, runner.seed or 0)
        if runner._load_from is None:
            _say('No load_from: the model that is quantized has random or pretrained weights only', logging.WARNING)
        _say(f'Calibrating the quantizers on {len(loader)} training batches')
        bar = _bar(len(loader) * (1 + self.bias_correction))
        calibrate(model, loader, bias_correction=self.bias_correction, progress=lambda: bar and bar.update())
        _end(bar)
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast(tensor.detach(), src=0)

    def _report(self, runner: Any) -> None:
        """Evaluate and save what post-training quantization alone gives."""
        runner.save_checkpoint(
            runner.work_dir,
            CHECKPOINT,
            save_optimizer=False,
            save_param_scheduler=False,
            by_epoch=False,
        )
        if runner.val_loop is None:
            return
        loader, evaluator = runner.val_loop.dataloader, runner.val_loop.evaluator
        first: list[Any] = []
        numbers = evaluate(runner.model, loader, evaluator, first.append)
        figures = '  '.join(f'{name}: {value:.4f}' for name, value in numbers.items())
        _say(f'Before training (post-training quantization, {CHECKPOINT}):  {figures}')
        runner.visualizer.add_scalars({f'post_training/{name}': value for name, value in numbers.items()}, step=0)
        if runner._load_from is None or not first:
            return  # there is no accuracy to lose
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model

        def evaluate_float() -> dict[str, float]:
            with without_quantizers(model):
                return evaluate(runner.model, loader, evaluator)

        warning = Collapse(model, first[0]).warning(numbers, evaluate_float)
        if warning:
            _say(warning, logging.WARNING)


@torch.no_grad()
def evaluate(model: Any, loader: Any, evaluator: Any, first: Callable[[Any], Any] | None = None) -> dict[str, float]:
    """A model's metrics, without a Runner's validation hooks, which would take them for those of an epoch.

    What is no number is left out: some metrics of MMPretrain's are tensors (a confusion matrix).

    Args:
        model: A module with ``val_step``; it ends in the mode that it had.
        loader: The validation set.
        evaluator: MMEngine's.
        first: Given the first batch.
    """
    training = model.training
    model.eval()
    _say(f'Evaluating on {len(loader.dataset)} validation samples')
    bar = _bar(len(loader))
    for number, batch in enumerate(loader):
        if first is not None and number == 0:
            first(deepcopy(batch))
        evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
        if bar:
            bar.update()
    _end(bar)
    metrics = evaluator.evaluate(len(loader.dataset))
    model.train(training)
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}


def _some_batches(loader: DataLoader[Any], count: int, seed: int) -> DataLoader[Any]:
    """A data loader over some of the training samples, made as the training's but for the sampler.

    The training's own must not be used: samplers count, and ``AUSAMSampler`` draws.
    """
    batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 1
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    chosen = order[: count * batch_size].tolist()
    return DataLoader(
        Subset(loader.dataset, chosen),
        batch_size=batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )


def _renew_averages(runner: Any) -> None:
    """EMAHook copied the model before weights and scales were there."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.ema_model = MODELS.build(hook.ema_cfg, default_args={'model': hook.src_model})


def _bar(count: int) -> ProgressBar | None:
    return ProgressBar(count) if is_main_process() else None


def _end(bar: ProgressBar | None) -> None:
    if bar:
        bar.file.write('\n')


def _say(message: str, level: int = logging.INFO) -> None:
    print_log(message, logger='current', level=level)
