"""MMEngine's ``compile=True`` beside two passes.

MMEngine compiles the model's ``train_step``, and with it the optimizer wrapper's hooks, which change from step to step.
Instead, the parts of the model that hold no loss are compiled, each by itself, for both passes and for evaluation: the
backbone and the neck, which take the time. (ESAM is refused: :func:`mm_sharp.step.checks.check_compiled`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from torch import nn

from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.module_tree import is_compiled
from mm_sharp.per_sample_loss.find import has_losses
from mm_sharp.step.optim_wrappers import optim_wrappers
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@HOOKS.register_module()
class CompileHook(Hook):  # type: ignore[misc]
    """Compile the parts of the model that hold no loss, where the config has MMEngine compile all of it.

    Added by itself to every Runner that uses this package; it does nothing without one of our optimizer wrappers.
    """

    def __init__(self) -> None:
        self._compiled: list[nn.Module] = []

    def before_train(self, runner: Any) -> None:
        """Undo MMEngine's compilation, which nothing has run yet, and compile the parts."""
        # Runner compiles train_step, FlexibleRunner forward unless told otherwise by 'target'.
        methods = [name for name in ('train_step', 'forward') if is_compiled(runner.model, name)]
        wrappers = optim_wrappers(runner.optim_wrapper).values()
        ours = any(isinstance(wrapper, TwoPassOptimWrapper) for wrapper in wrappers)
        if not runner.cfg.get('compile') or not methods or not ours:
            return
        for name in methods:
            delattr(runner.model, name)
        given = {} if runner.cfg['compile'] is True else runner.cfg['compile']
        options = {name: value for name, value in given.items() if name != 'target'}
        for name, part in parts_without_losses(unwrap(runner.model)):
            part.forward = torch.compile(part.forward, **options)
            self._compiled.append(part)
            print_log(f'Compiled for both passes: {name}', logger='current')

    def after_train(self, runner: Any) -> None:
        """Leave the model as it was."""
        for part in self._compiled:
            del part.forward
        self._compiled = []


def parts_without_losses(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the children of a model, or of models in it, that have parameters and no loss."""
    for name, child in model.named_children():
        if has_losses(name, child):
            if isinstance(child, BaseModel):
                yield from ((f'{name}.{inner}', part) for inner, part in parts_without_losses(child))
        elif type(child).forward is not nn.Module.forward and any(True for _ in child.parameters()):
            yield name, child
