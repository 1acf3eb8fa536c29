"""Say what a run does, in a few lines at its start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from mm_sharp.errors import UsageError
from mm_sharp.hooks.history import batch_size_of, training_length
from mm_sharp.ops.model_call import unwrap
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.step.method import Cost
from mm_sharp.step.optim_wrappers import optim_wrappers
from mm_sharp.step.wrapper import TwoPassOptimWrapper

# What rho is measured by, by `adaptive`.
_SCALES: dict[object, str] = {
    False: '',
    True: " in units of each weight's own size (adaptive=True)",
    'tensor': " of each tensor's norm at most (adaptive='tensor')",
    'layer': " of each tensor's norm (adaptive='layer')",
    'global': " of the weights' norm (adaptive='global')",
}


@HOOKS.register_module()
class StartHook(Hook):  # type: ignore[misc]
    """Log method, ``rho`` and its scale, what is perturbed, samples, their losses, and cost, before the first step.

    What only a step shows, :class:`mm_sharp.hooks.sharpness.SharpnessHook` says after the first one.

    Added by itself to every Runner that uses this package; it says nothing of other optimizer wrappers.
    """

    priority = 'VERY_LOW'  # after the hooks that fit wrappers, model and data loader to each other

    def before_train(self, runner: Any) -> None:
        """Log a block of lines for each wrapper."""
        wrappers = optim_wrappers(runner.optim_wrapper)
        # MMEngine would end at once, and write checkpoints. (An infinite sampler makes batches of few samples, too.)
        if not isinstance(runner.train_loop, IterBasedTrainLoop) and (message := no_batch(runner.train_dataloader)):
            raise UsageError(message)
        if message := missing_samples(runner):
            print_log(message, logger='current', level=logging.WARNING)
        length = training_length(runner.train_loop, runner.train_dataloader)
        batch_size = batch_size_of(runner.train_dataloader)
        # Of several wrappers, each may train a model of its own within the runner's.
        model = unwrap(runner.model) if len(wrappers) == 1 else None
        for name, wrapper in wrappers.items():
            if isinstance(wrapper, TwoPassOptimWrapper):
                title = f'{name}: ' if name else ''
                base = type(wrapper.optimizer).__name__
                lines = in_words(wrapper, batch_size, length, model)
                block = ''.join(f'\n    {what + ":":<12}{line}' for what, line in lines.items())
                print_log(f'{title}{type(wrapper).__name__} around {base}{block}', logger='current')


def no_batch(loader: Any) -> str:
    """That a data loader makes not one batch, and why; '' if it does, or that cannot be told."""
    try:
        batches, samples = len(loader), len(loader.dataset)
    except TypeError:  # of unknown length
        return ''
    if batches:
        return ''
    drop_last = getattr(loader.batch_sampler, 'drop_last', loader.drop_last)
    counts = f'{samples} samples, batch_size={batch_size_of(loader)}, drop_last={drop_last}'
    return f'train_dataloader makes no batch: {counts}: give it more samples, or take smaller batches'


def missing_samples(runner: Any) -> str:
    """That the config asks for more training samples than there are, which MMEngine passes over; '' if not."""
    loader = runner.cfg.get('train_dataloader')
    dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
    indices = dataset.get('indices') if isinstance(dataset, Mapping) else None
    if type(indices) is not int:
        return ''
    there = len(runner.train_dataloader.dataset)
    return f'train_dataloader.dataset.indices={indices}: the data set has {there} samples' if indices > there else ''


def in_words(
    wrapper: TwoPassOptimWrapper, batch_size: int, length: TrainingLength, model: nn.Module | None
) -> dict[str, str]:
    """What a wrapper does in a training, by what it is about, given N of a process and, where known, its ``model``."""
    settings = wrapper.settings
    quantized = '; in quantized layers the quantized weights' if settings.perturb_quantized else ''
    cost = wrapper.cost(batch_size)
    passes = (
        'in both passes' if cost.length == 1 else f'in both passes of one step of {cost.length}, in one of the others'
    )
    return {
        'rho': f'{settings.rho:g}{_SCALES[settings.adaptive]}',
        'perturbed': f'{wrapper.selector.in_words}{quantized}',
        'samples': f'all {batch_size} of a batch, {passes}',
        **wrapper.in_words(batch_size, length, model),
        'cost': cost_in_words(cost, length),
    }


def cost_in_words(cost: Cost, length: TrainingLength) -> str:
    """What a training costs, by counting passes."""
    base = "times the base optimizer's"
    if cost.first_epoch is not None and length.epoch_length is not None:
        line = f'{cost.over(length.epochs):.2f} {base}'
        if length.epochs > 1:
            line += f' over {length.epochs:g} epochs: {cost.first_epoch:.2f} in the first, then {cost.cycle:.2f}'
        return f'{line} (by counting passes)'
    mean = f', in the mean of {cost.length} steps' if cost.length > 1 else ''
    return f'{cost.cycle:.2f} {base}{mean} (by counting passes)'
