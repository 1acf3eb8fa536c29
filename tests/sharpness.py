"""Small measurements of sharpness, and what they find."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from mm_sharp.analysis.sharpness.loading import Samples
from mm_sharp.analysis.sharpness.measure import Findings, Settings

QUICK = Settings(batch_size=3, rhos=(0.1,), ascent_steps=1, trace_draws=2, points=3, landscape=('1d', '2d'))


def samples(rows: list[dict[str, Tensor]]) -> Samples:
    return Samples(rows, default_collate, 'rows', 'train', 0, len(rows), '')


def rows_of(**columns: Tensor) -> Samples:
    """Samples of which each tensor has a row."""
    count = len(next(iter(columns.values())))
    return samples([{name: value[i] for name, value in columns.items()} for i in range(count)])


def figures(found: Findings) -> dict[str, Any]:
    """What a measurement found but for its time."""
    assert found.eigenvalues is not None
    assert found.trace is not None
    return {
        'loss': found.loss,
        'gradient_norm': found.gradient_norm,
        'eigenvalue': found.eigenvalues.values,
        'trace': found.trace.value,
        'one_step': [ball.one_step for ball in found.balls],
        'ascent': [ball.ascent for ball in found.balls],
        'line': found.line,
        'plane': [value for values in found.plane for value in values],
    }


# Little of everything.
OPTIONS = (
    *('--samples', 3, '--batch-size', 2, '--rho', 0.05, '--ascent-steps', 1, '--tolerance', 0.2, '--trace-draws', 2),
    *('--points', 3),
)
