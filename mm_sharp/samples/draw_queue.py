"""Draws on their way: made when the data loader asked for a batch, needed when the batch arrives (ours).

Workers load ahead, so several batches are under way at a time, and arrive in the order in which they were drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from mm_sharp.samples.draw import BatchDraw
from mm_sharp.samples.history import Keys

# Far more than workers load ahead: it bounds what piles up where batches are loaded that nobody takes.
_MOST_ON_THE_WAY = 1024
# So many batches in a row without one expected sample are no chance: the keys are wrong.
_MOST_STRANGE = 8


@dataclass(frozen=True)
class LoaderDraw:
    """One mini-batch's draw and its place in the training.

    Args:
        epoch: The sampler's epoch.
        position: Number of the mini-batch in the epoch, from 0.
        draw: The draw.
        keys: The keys of the K samples that were drawn, in the order in which they are loaded.
    """

    epoch: int
    position: int
    draw: BatchDraw
    keys: list[tuple[str, int]]

    def fits(self, keys: Sequence[tuple[str, int]]) -> bool:
        """Whether it is a draw from the mini-batch of these N keys."""
        return self.draw.size == len(keys) and self.keys == [keys[row] for row in self.draw.chosen]

    def state_dict(self) -> dict[str, Any]:
        """The same in plain types and tensors."""
        draw = self.draw
        arrays = {'chosen': draw.chosen, 'pi': draw.pi, 'scores': draw.scores}
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        return {'epoch': self.epoch, 'position': self.position, 'keys': list(self.keys), **tensors}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LoaderDraw:
        """What :meth:`state_dict` was given for.

        Raises:
            ValueError: ``state`` is damaged.
        """
        try:
            chosen = np.array(state['chosen'], dtype=np.int64)
            pi, scores = (np.array(state[name], dtype=np.float64) for name in ('pi', 'scores'))
            keys = [(str(name), int(number)) for name, number in state['keys']]
            place = int(state['epoch']), int(state['position'])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'The state of a draw is damaged: {error!r}') from error
        rows = np.unique(chosen)
        inside = pi.ndim == 1 and rows.size > 0 and rows[0] >= 0 and rows[-1] < len(pi)
        if not inside or not np.array_equal(rows, chosen) or pi.shape != scores.shape or len(keys) != len(rows):
            found = f'pi of shape {pi.shape}, scores of {scores.shape}, {len(keys)} keys, rows {chosen.tolist()}'
            raise ValueError(f'The state of a draw is damaged, its parts do not belong together: {found}')
        return cls(*place, BatchDraw(chosen, pi, scores), keys)


class DrawQueue:
    """First in, first out, for draws whose batches may lose samples or get lost on the way."""

    def __init__(self) -> None:
        self._draws: deque[LoaderDraw] = deque()
        self._last: LoaderDraw | None = None
        self._strange = 0

    def __iter__(self) -> Iterator[LoaderDraw]:
        return iter(self._draws)

    def begin(self) -> Callable[[LoaderDraw], None]:
        """Forget the draws of an earlier iteration.

        Returns:
            What appends a draw of the new one. An earlier iteration that still runs appends to a queue that nobody
            reads.
        """
        self._draws, self._last = deque(maxlen=_MOST_ON_THE_WAY), None
        return self._draws.append

    def take(self, keys: Keys) -> BatchDraw:
        """The draw of a batch that arrived; earlier ones, whose batches were skipped, are forgotten.

        A data set may replace a sample that it cannot read by another one. So the batch's draw is the one that most of
        its keys agree with (the earliest of several), and if no key agrees with any, the first.

        Args:
            keys: The K keys of the samples that arrived.

        Raises:
            RuntimeError: There is no draw of K samples that it could be, or the keys of many batches in a row agree
                with none.
        """
        received = list(keys)
        if self._last is not None and self._last.keys == received and all(d.keys != received for d in self._draws):
            return self._last.draw  # a step that failed is tried again
        agreement = [_agreement(draw.keys, received) for draw in self._draws]
        best = max(agreement, default=-1)
        if best < 0 or (best == 0 and agreement[0] < 0):
            self._refuse(received)
        self._strange = 0 if best > 0 else self._strange + 1
        if self._strange > _MOST_STRANGE:
            self._refuse_strangers(received)
        for _ in range(agreement.index(best)):
            self._draws.popleft()
        self._last = self._draws.popleft()
        return self._last.draw

    def _refuse(self, received: Sequence[object]) -> NoReturn:
        if not self._draws:
            raise RuntimeError(
                f'AUSAMSampler: a batch of {len(received)} samples arrived, but no draw is on its way. Batches must '
                'come from the training data loader, each once and in its order (in_order=True)'
            )
        raise RuntimeError(
            f'AUSAMSampler: a batch of {len(received)} samples arrived where {len(self._draws[0].keys)} were drawn. '
            'A collate function or data preprocessor that adds or leaves out samples cannot be used with it'
        )

    def _refuse_strangers(self, received: Sequence[object]) -> NoReturn:
        raise RuntimeError(
            f'AUSAMSampler: not one sample of the last {self._strange} batches is one that was drawn; it expected '
            f'{self._draws[0].keys[0]!r} and got {received[0]!r}. The data set gives its samples other keys (data '
            "set's name, id) when they are loaded than when they are looked up"
        )


def _agreement(drawn: Sequence[object], received: Sequence[object]) -> int:
    """How many of the keys are equal, row by row; -1 if there are not as many."""
    if len(drawn) != len(received):
        return -1
    return sum(a == b for a, b in zip(drawn, received, strict=True))
