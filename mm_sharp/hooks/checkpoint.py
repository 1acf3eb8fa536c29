"""Checks of a checkpoint that is resumed or tested: is it of this model and of this optimizer?

Where names or shapes do not fit, MMEngine goes on with random weights and a line in the log; and torch's optimizers
load each other's state, which fails steps later or never. For a run that is resumed and for a test every such
difference is an error. A checkpoint that training starts from (``load_from``) may be of a part of the model, but not of
none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop
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
            states = checkpoint['optimizer']
            for name, wrapper in optim_wrappers(runner.optim_wrapper).items():
                if isinstance(getattr(wrapper, 'optimizer', None), Optimizer):
                    check_base_optimizer(wrapper.optimizer, states.get(name, {}) if name else states)
        trains = isinstance(runner._train_loop, BaseLoop)
        check_next_load(model, 'resume' if resumes else 'train' if trains else 'test')


def check_next_load(model: nn.Module, purpose: str = 'test') -> None:
    """Have a model raise UserError at the next state dict that it loads, if that does not fit a ``purpose``.

    ``'resume'``: keys and shapes must be equal; ``'test'``: nothing may be missing or of another shape; ``'train'``:
    something must fit.
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
    weights = {name for name, _ in model.named_parameters()}
    misshapen = {name for error in errors for name in re.findall(r'size mismatch for (\S+):', error)}
    if weights and weights <= {*keys.missing_keys, *misshapen}:
        raise UserError(
            f'the checkpoint holds none of the {len(weights)} weights of the model ({some(_missing(keys))}): it holds '
            f'{some(keys.unexpected_keys) or "others of the same names"}; load_from needs a checkpoint of this model '
            'or of parts of it'
        )


def _check_whole(model: nn.Module, keys: Any, errors: list[str], purpose: str) -> None:
    resumes, missing, unexpected = purpose == 'resume', _missing(keys), keys.unexpected_keys
    faults = [f'{len(missing)} of its weights are missing ({some(missing)})'] if missing else []
    faults += [f'{len(errors)} do not fit ({some(errors, 2)})'] if errors else []
    faults += [f'{len(unexpected)} are not in the model ({some(unexpected)})'] if resumes and unexpected else []
    if faults:
        advice = OTHERWISE if resumes else 'use the config that it was trained with'
        raise UserError(f'the checkpoint is not of this model: {", ".join(faults)}: {advice}')


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
