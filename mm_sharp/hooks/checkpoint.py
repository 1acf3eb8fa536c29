"""Checks of a checkpoint that is resumed or tested: is it of this model and of this optimizer?

Where names or shapes do not fit, MMEngine goes on with random weights and a line in the log; and torch's optimizers
load each other's state, which fails steps later or never. For a run that is resumed and for a test every such
difference is an error. A checkpoint that training starts from (``load_from``) may be of a part of the model, which the
log says, but not of none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from mm_sharp.errors import UserError, some
from mm_sharp.step.checkpoint import OTHERWISE, check_base_optimizer
from mm_sharp.step.optim_wrappers import optim_wrappers

# Quantized models have rules of their own about their quantizers, which may be missing (mm_sharp.quantization.record).
_QUANTIZER = 'tensor_quant'


class CheckpointCheckHook(Hook):  # type: ignore[misc]  # MMEngine ships no types
    """Refuses a checkpoint that does not belong to the run which resumes or tests it.

    Added by itself to every run that uses mm_sharp, and to the runs of our tools.
    """

    priority = 'LOWEST'  # after the hooks that change what was loaded

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check everything but the weights; :func:`check_next_load` has these checked."""
        # Runner.resume would run it: a config is a program, which a checkpoint of anyone's may bring along.
        if isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)
        model = _unwrapped(runner.model)
        if model is None:
            return
        resumes = bool(runner._resume) and not runner._has_loaded
        if resumes:
            _check_entries(checkpoint)
            try:
                _check_optimizers(runner, checkpoint['optimizer'])
            except UserError as error:
                _check_any(model, checkpoint, error)
                raise
        trains = isinstance(runner._train_loop, BaseLoop)
        check_next_load(model, 'resume' if resumes else 'train' if trains else 'test')

    def before_train(self, runner: Any) -> None:
        """Say so if a resumed run has nothing left to do."""
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        name, what, made = (
            ('max_epochs', 'epochs', runner.epoch) if by_epoch else ('max_iters', 'iterations', runner.iter)
        )
        length = getattr(runner.train_loop, name, None)
        if length and made >= length:
            text = f'all {length} {what} are made already: raise train_cfg.{name} to go on'
            print_log(text, logger='current', level=logging.WARNING)


def check_next_load(model: nn.Module, purpose: str = 'test') -> None:
    """Have a model raise UserError at the next state dict that it loads, if that does not fit a ``purpose``.

    ``'resume'``: keys and shapes must be equal; ``'test'``: nothing may be missing or of another shape; ``'train'``:
    something must fit, and a warning names what does not.
    """
    errors: list[list[str]] = []  # into which the modules write what does not fit

    def after(model: nn.Module, keys: Any) -> None:
        for handle in handles:
            handle.remove()
        check = _check_start if purpose == 'train' else _check_whole
        check(model, keys, errors[-1], purpose)

    # Not by strict=True, with which MMEngine raises on rank 0 only.
    before = model._register_load_state_dict_pre_hook(lambda *args: errors.append(args[-1]))
    handles = before, model.register_load_state_dict_post_hook(after)


def _check_start(model: nn.Module, keys: Any, errors: list[str], purpose: str) -> None:
    weights, lacking = _weights(model), _lacking(keys, errors)
    without = [name for name in weights if name in lacking]
    if weights and len(without) == len(weights):
        raise UserError(
            f'the checkpoint holds none of the {len(weights)} weights of the model ({some(weights)}): it holds '
            f'{some(keys.unexpected_keys) or "others of the same names"}; load_from needs a checkpoint of this model '
            'or of parts of it'
        )
    if lacking:
        print_log(
            f'load_from: {len(weights) - len(without)} of {len(weights)} weights were loaded; without a fitting value '
            f'in the file: {some(lacking)}',
            logger='current',
            level=logging.WARNING,
        )


def _check_whole(model: nn.Module, keys: Any, errors: list[str], purpose: str) -> None:
    resumes, missing, unexpected = purpose == 'resume', _missing(keys), keys.unexpected_keys
    faults = [f'{len(missing)} of its weights are missing ({some(missing)})'] if missing else []
    faults += [f'{len(errors)} do not fit ({some(errors, 2)})'] if errors else []
    faults += [f'{len(unexpected)} are not in the model ({some(unexpected)})'] if resumes and unexpected else []
    if faults:
        useful = not {*_weights(model)} <= _lacking(keys, errors).keys()
        advice = OTHERWISE if resumes and useful else 'use the config that it was trained with'
        raise UserError(f'the checkpoint is not of this model: {", ".join(faults)}: {advice}')


def _check_optimizers(runner: Any, states: Mapping[str, Any]) -> None:
    """Raise if a checkpoint's optimizer state is of other optimizers than a run's."""
    for name, wrapper in optim_wrappers(runner.optim_wrapper).items():
        if isinstance(getattr(wrapper, 'optimizer', None), Optimizer):
            check_base_optimizer(wrapper.optimizer, states.get(name, {}) if name else states)


def _check_any(model: nn.Module, checkpoint: Mapping[str, Any], error: UserError) -> None:
    """Raise from ``error``, which is about the optimizer, if a checkpoint has not a single weight of the model."""
    state = checkpoint.get('state_dict')
    saved = {re.sub(r'^module\.', '', name): value for name, value in state.items()} if state else {}
    ours = {name: value for name, value in model.state_dict().items() if 'num_batches_tracked' not in name}
    fits = (getattr(saved.get(name), 'shape', None) == getattr(value, 'shape', ()) for name, value in ours.items())
    if ours and not any(fits):
        raise UserError(
            f'the checkpoint is of another model: it holds {some(saved) or "no weights"}, and none of the {len(ours)} '
            f"entries of this model's state ({some(ours)}): use the config that it was trained with"
        ) from error


def _weights(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if _QUANTIZER not in name]


def _lacking(keys: Any, errors: list[str]) -> dict[str, None]:
    """What has got no value, as it is not in the file or of another shape there; in order."""
    return dict.fromkeys([*_missing(keys), *misshapen(errors)])


def misshapen(errors: list[str]) -> list[str]:
    """What is of another shape in the file, by name, given what torch's modules have written of it while loading."""
    return [name for error in errors for name in re.findall(r'size mismatch for (\S+):', error)]


def _missing(keys: Any) -> list[str]:
    return [key for key in keys.missing_keys if 'num_batches_tracked' not in key and _QUANTIZER not in key]


def _check_entries(checkpoint: Mapping[str, Any]) -> None:
    """Raise if a checkpoint lacks what a run needs to go on."""
    meta = checkpoint.get('meta')
    lacking = [key for key in ('meta', 'optimizer', 'message_hub') if not isinstance(checkpoint.get(key), Mapping)]
    if isinstance(meta, Mapping):
        counts = [key for key in ('epoch', 'iter') if isinstance(meta.get(key), int) and meta[key] >= 0]
        lacking += [f'meta.{key}' for key in ('epoch', 'iter') if key not in counts]
    if lacking:
        raise UserError(
            f'the checkpoint cannot be resumed, only its weights can be used: it has no {some(lacking)}. Write '
            'load_from=… and leave out --resume'
        )


def _unwrapped(model: nn.Module) -> nn.Module | None:
    """The model that loads; None if its weights are sharded, which have names and shapes of their own."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        if not isinstance(model, (DistributedDataParallel, DataParallel, BaseTTAModel)):
            return None
        model = model.module
    return model
