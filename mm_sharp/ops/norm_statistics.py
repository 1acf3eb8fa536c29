"""BatchNorm's running statistics over the forward passes of a step, without copying them back and forth.

In training mode a BatchNorm only writes its running statistics. In further passes ``track_running_stats`` is off, and
the buffers' places are taken by copies from before the step, for a model that reads them. The buffers themselves stay
as the first pass has left them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from mm_sharp.ops.rare_changes import is_ordinary
from mm_sharp.ops.tensor_backup import TensorBackup

# Exact classes: others may do anything with their statistics.
BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm})
_STATISTICS = frozenset({'running_mean', 'running_var', 'num_batches_tracked'})


class NormStatistics:
    """The statistics of BatchNorms, which further passes do not touch; ``backup`` has their copies."""

    def __init__(self) -> None:
        self._norms: list[Any] = []
        self.backup = TensorBackup()
        self._hidden: list[tuple[Any, dict[str, Any]]] = []
        self._known: list[Tensor] = []  # found to be simple before, all of them
        self._floats: list[Tensor] = []

    def save(self, norms: Sequence[nn.Module]) -> list[nn.Module]:
        """Copy the statistics of ``norms``; returns those that have to be copied in another way."""
        self._norms = [norm for norm in norms if norm.training and vars(norm)['track_running_stats']]
        buffers = [buffer for norm in self._norms for buffer in norm._buffers.values()]
        if len(buffers) != len(self._known) or not all(map(is_, buffers, self._known)):
            self._norms = [norm for norm in self._norms if _is_simple(norm)]
            self._known = buffers = [buffer for norm in self._norms for buffer in norm._buffers.values()]
            self._floats = [buffer for buffer in buffers if buffer.is_floating_point()]
        self.backup.save(buffers)
        if len(self._norms) == len(norms):
            return []
        taken = set(map(id, self._norms))
        return [norm for norm in norms if id(norm) not in taken]

    @property
    def floats(self) -> list[Tensor]:
        """Running means and variances."""
        return self._floats if self._norms else []

    def hide(self) -> None:
        """Put the copies in the buffers' places, and stop the updates."""
        copies = {id(buffer): copy for buffer, copy in self.backup.pairs}
        for norm in self._norms:
            held = norm._buffers
            self._hidden.append((norm, dict(held)))
            for name, buffer in held.items():
                held[name] = copies[id(buffer)]
            vars(norm)['track_running_stats'] = False

    def show(self) -> None:
        """Undo :meth:`hide`: the buffers are as the first pass has left them."""
        for norm, held in self._hidden:
            norm._buffers.update(held)
            vars(norm)['track_running_stats'] = True
        self._hidden = []

    def write_back(self, apart_from: Iterable[Tensor] = ()) -> None:
        """Write back what was before the step; see :meth:`TensorBackup.write_back`."""
        self.show()
        self.backup.write_back(apart_from)

    def discard(self) -> None:
        """Undo :meth:`hide`, and forget the copies."""
        self.show()
        self.backup.discard()
        self._norms = []


def _is_simple(norm: Any) -> bool:
    """Whether a BatchNorm's buffers are the usual ones."""
    held: dict[str, Any] = norm._buffers
    return held.keys() == _STATISTICS and all(buffer is not None and is_ordinary(buffer) for buffer in held.values())
