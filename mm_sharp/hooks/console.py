"""What the console shows of the scalars under ``sharpness/``: TensorBoard and the JSON log have them all.

MMEngine's log processor puts every scalar of the message hub into the line that it prints. For a run with a
:class:`mm_sharp.hooks.sharpness.SharpnessHook`, the line is made of a hub without most of ours. Whatever class the
processor is of, it stays as it is otherwise.

The processor smooths scalars whose names contain ``loss`` or ``time``, as those of a model's parts may. Of ours it
shows the last value, whatever the name.

The hub keeps the last value of every scalar for ever, and the processor would log it again and again. So what is shown,
on all backends, is what was written since the last log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmengine.logging import HistoryBuffer, MessageHub

PREFIX = 'train/sharpness/'
# By what one steers: does the loss rise, how far are the weights moved, is that too far, does the gradient explode?
STEERING = ('sharpness', 'rho_relative', 'linearity', 'g_norm')


def shorten_console_line(processor: Any, hub: MessageHub, wrappers: Sequence[str]) -> set[str]:
    """Have a runner's log ``processor`` log what is new of our scalars, and print at most four, without ``sharpness/``.

    ``wrappers`` are what the names of each optimizer wrapper begin with: ``''`` for a single one. Returns the hub's
    names of our scalars that the next log shows, for the hook to add to; each log empties it. A second call changes
    nothing, and returns the same set.
    """
    get_log = processor.get_log_after_iter
    if hasattr(get_log, 'written'):
        written: set[str] = get_log.written
        return written
    written = set()
    shown = [f'{wrapper}{name}' for wrapper in wrappers for name in STEERING[: max(1, 4 // len(wrappers))]][:4]

    @wraps(get_log)
    def short(runner: Any, batch_idx: int, mode: str) -> tuple[dict[str, Any], str]:
        if mode != 'train':
            log: tuple[dict[str, Any], str] = get_log(runner, batch_idx, mode)
            return log
        with _only(hub, {key: key for key in hub.log_scalars if key in written}):
            tag, _ = get_log(runner, batch_idx, mode)
        with _only(hub, {f'{PREFIX}{name}': f'train/{name}' for name in shown if f'{PREFIX}{name}' in written}):
            _, line = get_log(runner, batch_idx, mode)
        written.clear()
        return tag, line

    short.written = written  # type: ignore[attr-defined]
    processor.get_log_after_iter = short
    return written


class _Unsmoothed(HistoryBuffer):  # type: ignore[misc]
    """The history of a scalar whose mean is its last value; what ``custom_cfg`` asks for is of the whole history."""

    def mean(self, window_size: int | None = None) -> Any:
        """The last value."""
        return self.current()


@contextmanager
def _only(hub: MessageHub, shown: Mapping[str, str]) -> Iterator[None]:
    """Within, the hub has only those of our scalars that are shown, by other names and behind all others."""
    scalars = hub.log_scalars
    whole = dict(scalars)
    others = {key: value for key, value in whole.items() if not key.startswith(PREFIX)}
    try:
        scalars.clear()
        scalars.update({**others, **{name: _Unsmoothed(*whole[key].data) for key, name in shown.items()}})
        yield
    finally:
        scalars.clear()
        scalars.update(whole)
