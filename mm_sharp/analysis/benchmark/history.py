"""Memory and times of a sample history (ours)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_sharp.analysis.benchmark.compare import Quartiles, columns, quartiles
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.table import IntArray

NAME = 'benchmark'
BATCH_SIZES = (32, 64, 256)
_REPEATS = 200
# Odd, and about 2**64 over the golden ratio: its multiples, modulo 2**64, differ and lie all over the range.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class HistoryCost:
    """What a history of ``samples`` samples costs.

    Args:
        ids: ``'dense'`` (0 to ``samples - 1``) or ``'sparse'`` (all over the 64-bit integers).
        samples: Samples seen.
        nbytes: Memory of the history.
        build_seconds: A first epoch in random order, in mini-batches of 256.
        look_up_seconds: Of a mini-batch of random keys, by its size.
        update_seconds: Of the same.
        file_bytes: Of a checkpoint with nothing else in it.
        save_seconds: ``state_dict`` and ``torch.save``.
        load_seconds: ``torch.load`` and ``load_state_dict``.
    """

    ids: str
    samples: int
    nbytes: int
    build_seconds: float
    look_up_seconds: dict[int, Quartiles]
    update_seconds: dict[int, Quartiles]
    file_bytes: int
    save_seconds: float
    load_seconds: float


def measure_history(samples: int, ids: str, seed: int = 0) -> HistoryCost:
    """Build a history, use it, save it and load it.

    Args:
        samples: How many to hold, at least 1.
        ids: ``'dense'`` or ``'sparse'``.
        seed: Of the order and of the keys looked up.
    """
    rng = np.random.default_rng(seed)
    numbers = ids_of(samples, ids)
    history = SampleHistory()
    build = _build(history, rng.permutation(numbers), rng)
    assert len(history) == samples
    look_up, update = {}, {}
    for size in BATCH_SIZES:
        batches = [[(NAME, int(i)) for i in rng.choice(numbers, size)] for _ in range(_REPEATS)]
        differences = rng.exponential(size=size)
        look_up[size] = quartiles([_seconds(partial(history.scores, batch)) for batch in batches])
        update[size] = quartiles([_seconds(partial(history.update, batch, differences)) for batch in batches])
    file_bytes, save, load = _save_and_load(history, numbers[:1000])
    return HistoryCost(ids, samples, history.nbytes, build, look_up, update, file_bytes, save, load)


def ids_of(samples: int, kind: str) -> IntArray:
    """Distinct ids, ``'dense'`` or ``'sparse'``, shape (samples,)."""
    dense = np.arange(samples)
    return dense if kind == 'dense' else (dense.astype(np.uint64) * _SPREAD).view(np.int64)


def _build(history: SampleHistory, order: IntArray, rng: np.random.Generator) -> float:
    differences = rng.exponential(size=len(order))
    size = max(BATCH_SIZES)

    def epoch() -> None:
        for start in range(0, len(order), size):
            history.update_of(NAME, order[start : start + size], differences[start : start + size])

    return _seconds(epoch)


def _save_and_load(history: SampleHistory, some: IntArray) -> tuple[int, float, float]:
    """File size, and seconds to save and to load."""
    loaded = SampleHistory()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'history.pth'
        save = _seconds(lambda: torch.save(history.state_dict(), file))
        load = _seconds(lambda: loaded.load_state_dict(torch.load(file, weights_only=True)))
        size = file.stat().st_size
    assert np.array_equal(loaded.scores_of(NAME, some), history.scores_of(NAME, some))
    return size, save, load


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def history_table(costs: Sequence[HistoryCost]) -> str:
    """The costs as text, one column for each."""
    lines = [['', *(f'{cost.ids} ids' for cost in costs)]]
    lines.append(['samples', *(f'{cost.samples:,}' for cost in costs)])
    lines.append(['memory, bytes a sample', *(f'{cost.nbytes / cost.samples:.2f}' for cost in costs)])
    lines.append(['checkpoint, bytes a sample', *(f'{cost.file_bytes / cost.samples:.2f}' for cost in costs)])
    lines.append(['first epoch, by 256, s', *(f'{cost.build_seconds:.3f}' for cost in costs)])
    for size in BATCH_SIZES:
        lines.append([f'look up {size}, us', *(_microseconds(cost.look_up_seconds[size]) for cost in costs)])
    for size in BATCH_SIZES:
        lines.append([f'update {size}, us', *(_microseconds(cost.update_seconds[size]) for cost in costs)])
    lines.append(['save, s', *(f'{cost.save_seconds:.3f}' for cost in costs)])
    lines.append(['load, s', *(f'{cost.load_seconds:.3f}' for cost in costs)])
    return columns(lines)


def _microseconds(values: Quartiles) -> str:
    return f'{1e6 * values.median:.0f} ({1e6 * values.low:.0f} to {1e6 * values.high:.0f})'
