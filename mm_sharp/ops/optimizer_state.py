"""Whether an optimizer's state in a checkpoint is of the optimizer that is to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from mm_sharp.errors import UserError, some

OTHERWISE = 'use the config that it was trained with, or start from its weights: load_from=…, without --resume'


def check_base_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise unless the state of an ``OptimWrapper`` is of the same kind of optimizer and of as many parameters.

    Ours names the base optimizer; in MMEngine's it shows in the hyperparameters.
    """
    name = type(optimizer).__name__
    groups = state.get('param_groups')
    if not isinstance(groups, list) or not isinstance(state.get('state'), Mapping):
        raise UserError(f"the checkpoint's optimizer state is damaged: it lacks state or param_groups. {OTHERWISE}")
    saved = (state.get('mm_sharp') or {}).get('base_optimizer', name)
    # Flags are left out: newer versions of torch add some, and do without.
    needed = {key for key, value in optimizer.defaults.items() if value is not None and not isinstance(value, bool)}
    lacking = sorted({key for group in groups for key in needed - group.keys()})
    if saved != name or lacking:
        found = f'of {saved}' if saved != name else f'of another optimizer (it has no {some(lacking)})'
        raise UserError(f"the checkpoint's optimizer state is {found}, and the config has {name}: {OTHERWISE}")
    sizes = [[len(group['params']) for group in side] for side in (groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the checkpoint's optimizer state is of {sum(sizes[0])} parameters in {len(sizes[0])} groups, and the "
            f'config makes {sum(sizes[1])} in {len(sizes[1])} (model, paramwise_cfg): {OTHERWISE}'
        )
