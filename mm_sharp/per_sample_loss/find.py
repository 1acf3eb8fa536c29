"""Where a model keeps its loss modules, and what is known of heads that treat their losses specially (ours)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.logging import MessageHub
from torch import nn

from mm_sharp.validation import UnsupportedError

# MMPose heads that match predictions with people: a row of their losses is an anchor or a person.
_ROWS_ARE_NOT_SAMPLES = ('YOLOXPoseHead', 'RTMOHead', 'CIDHead', 'EDPoseHead')


class PerSampleLossError(UnsupportedError):
    """A model's loss has no form for single samples that could be found.

    Attributes:
        what: The reason alone, without advice.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f'{what} ESAM and AUSAM need the loss of every sample. What works with every model and head is SAM: '
            "optim_wrapper = dict(type='SAMOptimWrapper', rho=0.05, optimizer=...). docs/per_sample_losses.md lists "
            'the heads and losses that work with all three.'
        )


@dataclass(frozen=True)
class LossModule:
    """A loss module and its place in the model.

    Args:
        module: The module.
        owner: The module that has it.
        path: Its name within the model, such as ``head.loss_module``.
    """

    module: nn.Module
    owner: nn.Module
    path: str

    @property
    def name(self) -> str:
        """For messages: owner, path and class."""
        return f"{type(self.owner).__name__}'s {self.path} ({type(self.module).__name__})"

    def outside_factor(self, model: nn.Module, index: int) -> float:
        """What the model multiplies the ``index``-th output of this loss by before it returns it.

        1 but for two models of MMPose: ``DSNTHead`` drops its second loss from an epoch on, and ``DWPoseDistiller``
        fades its distillation losses out over the epochs, or leaves the student's own out.
        """
        if type(self.owner).__name__ == 'DSNTHead' and index > 0:
            switch: Any = self.owner.lambda_t
            return 0.0 if switch > 0 and MessageHub.get_current_instance().get_info('epoch') >= switch else 1.0
        if type(model).__name__ == 'DWPoseDistiller':
            distiller: Any = model
            if self.path.startswith('distill_losses.'):
                return 1.0 if distiller.two_dis else 1.0 - distiller.epoch / distiller.max_epochs
            return 0.0 if distiller.two_dis else 1.0
        return 1.0


def find_losses(model: nn.Module) -> list[LossModule]:
    """The outermost loss modules of ``model``, each once.

    A loss is a child whose attribute has "loss" in its name or whose class's name ends in "Loss", in lists and dicts
    of modules too, registered ones and plain ones. What a loss is made of is not looked at.

    Raises:
        PerSampleLossError: ``model`` has a head whose losses have rows that are not samples.
    """
    for member in model.modules():
        names = {cls.__name__ for cls in type(member).__mro__} & set(_ROWS_ARE_NOT_SAMPLES)
        if names:
            raise PerSampleLossError(
                f'{type(member).__name__}: the rows of its losses are anchors or people, not samples, and cannot be '
                'told apart by picture.'
            )
    found: dict[int, LossModule] = {}
    for loss in _walk(model, ''):
        found.setdefault(id(loss.module), loss)
    return list(found.values())


def has_losses(name: str, module: nn.Module) -> bool:
    """Whether a module that is called ``name`` is a loss, or has one."""
    return 'loss' in name.lower() or type(module).__name__.endswith('Loss') or any(True for _ in _walk(module, ''))


def _walk(owner: nn.Module, prefix: str) -> Iterator[LossModule]:
    for name, value in [*owner.named_children(), *_plain_containers(owner)]:
        path = prefix + name
        if 'loss' in name.lower():
            yield from _losses_in(value, owner, path)
        elif isinstance(value, nn.Module):
            if type(value).__name__.endswith('Loss'):
                yield from _losses_in(value, owner, path)
            else:
                yield from _walk(value, path + '.')
        else:
            yield from (loss for loss in _losses_in(value, owner, path) if type(loss.module).__name__.endswith('Loss'))


def _plain_containers(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if type(value) in (list, tuple, dict) and not name.startswith('_')
    ]


def _losses_in(value: Any, owner: nn.Module, path: str) -> Iterator[LossModule]:
    """``value`` itself, or what it contains where it is a container that cannot be called."""
    if isinstance(value, nn.Module):
        if type(value).forward is not nn.Module.forward:
            yield LossModule(value, owner, path)
            return
        value = dict(value.named_children())
    if isinstance(value, (list, tuple)):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _losses_in(item, owner, f'{path}.{name}')
