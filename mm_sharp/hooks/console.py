"""What the console shows of the scalars under ``sharpness/``: TensorBoard and the JSON log have them all.

MMEngine's log processor puts every scalar of the message hub into the line that it prints. For a run with a
:class:`mm_sharp.hooks.sharpness.SharpnessHook`, the line is made of a hub without most of ours. Whatever class the
processor is of, it stays as it is otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmengine.logging import MessageHub

PREFIX = 'train/sharpness/'
# By what one steers: does the loss rise, how far are the weights moved, is that too far, does the gradient explode?
STEERING = ('sharpness', 'rho_relative', 'linearity', 'g_norm')


def shorten_console_line(processor: Any, hub: MessageHub, wrappers: Sequence[str]) -> None:
    """Have ``processor`` print at most four of our scalars, without ``sharpness/``; a second call changes nothing.

    Args:
        processor: The runner's log processor.
        hub: The runner's message hub.
        wrappers: What the names of each optimizer wrapper begin with: ``''`` for a single one.
    """
    get_log = processor.get_log_after_iter
    if hasattr(get_log, '_is_short'):
        return
    shown = [f'{wrapper}{name}' for wrapper in wrappers for name in STEERING[: max(1, 4 // len(wrappers))]][:4]

    @wraps(get_log)
    def short(runner: Any, batch_idx: int, mode: str) -> tuple[dict[str, Any], str]:
        tag, line = get_log(runner, batch_idx, mode)
        if mode == 'train':
            with _only(hub, shown):
                _, line = get_log(runner, batch_idx, mode)
        return tag, line

    short._is_short = True  # type: ignore[attr-defined]
    processor.get_log_after_iter = short


@contextmanager
def _only(hub: MessageHub, shown: Sequence[str]) -> Iterator[None]:
    """Within, the hub has only those of our scalars that are shown, without the prefix and behind all others."""
    scalars = hub.log_scalars
    whole = dict(scalars)
    others = {key: value for key, value in whole.items() if not key.startswith(PREFIX)}
    ours = {f'train/{name}': whole[f'{PREFIX}{name}'] for name in shown if f'{PREFIX}{name}' in whole}
    try:
        scalars.clear()
        scalars.update({**others, **ours})
        yield
    finally:
        scalars.clear()
        scalars.update(whole)


def rename_old_scalars(hub: MessageHub, wrappers: Sequence[str]) -> None:
    """Put what a checkpoint of before version 0.2 has logged, without ``sharpness/``, under the names of today."""
    scalars = hub.log_scalars
    for wrapper in wrappers:
        if f'train/{wrapper}L_w' not in scalars:
            continue
        names = ('L_w', 'L_w_e', *STEERING, 'pass2_share', 'mean_difference', 'sampling_entropy', 'large_scores', 'rho')
        for key in list(scalars):
            name = key.removeprefix('train/').removeprefix(wrapper)
            if key == f'train/{wrapper}{name}' and (name in names or name.startswith('share_')):
                scalars[f'{PREFIX}{wrapper}{name}'] = scalars.pop(key)
