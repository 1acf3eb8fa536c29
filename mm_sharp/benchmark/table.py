"""All that is measured of the methods at one batch size (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmengine.config import Config

from mm_sharp.benchmark.compare import Row, compare, quartiles, step_table
from mm_sharp.benchmark.methods import step_limit
from mm_sharp.benchmark.phases import Phases, phase_table, typical
from mm_sharp.benchmark.subject import FLOAT, load_subject

# Of the rounds with marks in between there are fewer: their shares scatter less than the ratios' distances matter.
_PHASE_SHARE = 4


@dataclass(frozen=True)
class Table:
    """What was measured at one batch size.

    Args:
        batch_size: Samples a step.
        rounds: Timed steps of each method.
        rows: Times, ratios and memory.
        phases: Where the time of a typical step goes, in seconds, by method.
        settings: Config of each method's optimizer wrapper.
        times: Seconds of each round's step, by method.
    """

    batch_size: int
    rounds: int
    rows: list[Row]
    phases: dict[str, Phases]
    settings: dict[str, dict[str, Any]]
    times: dict[str, list[float]]

    def text(self) -> str:
        """For people."""
        parts = [f'batch size {self.batch_size}, {self.rounds} rounds', step_table(self.rows)]
        if FLOAT in self.times:
            parts.append(self._quantization_cost())
        return '\n'.join([*parts, '', phase_table(self.phases)])

    def figures(self) -> dict[str, Any]:
        """For programs: plain types."""
        rows = [{**asdict(row), 'distance_percent': row.distance} for row in self.rows]
        methods = [
            {'method': name, 'optim_wrapper': own, 'seconds': self.times[name], 'phase_seconds': self.phases[name]}
            for name, own in self.settings.items()
        ]
        return {'batch_size': self.batch_size, 'rounds': self.rounds, 'rows': rows, 'methods': methods}

    def _quantization_cost(self) -> str:
        """What a step of the base optimizer costs more on the quantized model than on the float one, in words."""
        pairs = zip(self.times['base'], self.times[FLOAT], strict=True)
        ratio = quartiles([quantized / plain for quantized, plain in pairs])
        return f'base, quantized over float: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})'


def measure_table(
    cfg: Config, settings: Mapping[str, Mapping[str, Any]], batch_size: int, rounds: int, warmup: int
) -> Table:
    """Measure all methods: step times first, then memory, then phases, each in steps of their own.

    Args:
        cfg: The whole training config, whose data files are there.
        settings: Config of each method's optimizer wrapper, by name; ``'base'`` is what the others are compared with.
        batch_size: Samples a step.
        rounds: Timed steps of each method, at least; it becomes whole refresh cycles.
        warmup: Steps of each method before, at least 1.

    Raises:
        UsageError: The data set is smaller than a batch, a method does not work with this model, or a loss is not
            finite.
    """
    limits: dict[str, Any] = {name: step_limit(cfg, own, batch_size) for name, own in settings.items()}
    cycle = max(limit.refresh for limit in limits.values())
    rounds, few = (-(-number // cycle) * cycle for number in (rounds, -(-rounds // _PHASE_SHARE)))
    subject = load_subject(cfg, batch_size)
    own = {name: dict(wrapper) for name, wrapper in settings.items()}
    if subject.float_model is not None:
        own, limits = {FLOAT: own['base'], **own}, {FLOAT: None, **limits}
    times = subject.measure(own, rounds, warmup)
    refresh = {name: 1 if limit is None else limit.refresh for name, limit in limits.items()}
    peaks = {name: subject.peak_memory(name, own[name], steps=refresh[name]) for name in own}
    phases = typical(subject.measure_phases(own, few), limits, done=1)
    rows = compare(times, limits, batch_size, steps_before=warmup, peaks=peaks)
    return Table(batch_size, rounds, rows, phases, own, times)
