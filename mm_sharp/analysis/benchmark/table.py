"""All that is measured of the methods at one batch size (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmengine.config import Config

from mm_sharp.analysis.benchmark.baselines import PEERS
from mm_sharp.analysis.benchmark.compare import Quartiles, Row, columns, compare, quartiles, step_table
from mm_sharp.analysis.benchmark.methods import StepLimit, step_limit, whole_settings
from mm_sharp.analysis.benchmark.passes_only import SUFFIX, own_work, passes_of
from mm_sharp.analysis.benchmark.phases import Phases, phase_table, typical
from mm_sharp.analysis.benchmark.workload import FLOAT, load_subject

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
        own: What each method's step takes above its floor, in steps of the base optimizer; empty where no floors were
            measured.
    """

    batch_size: int
    rounds: int
    rows: list[Row]
    phases: dict[str, Phases]
    settings: dict[str, dict[str, Any]]
    times: dict[str, list[float]]
    own: dict[str, Quartiles]

    def text(self) -> str:
        """For people."""
        parts = [f'batch size {self.batch_size}, {self.rounds} rounds', step_table(self.rows)]
        if FLOAT in self.times:
            parts.append(self._quantization_cost())
        if self.own:
            parts += ['', self._own_work()]
        return '\n'.join([*parts, '', phase_table(self.phases)])

    def figures(self) -> dict[str, Any]:
        """For programs: plain types."""
        rows = [{**asdict(row), 'distance_percent': row.distance} for row in self.rows]
        methods = [
            {'method': name, 'optim_wrapper': own, 'seconds': self.times[name], 'phase_seconds': self.phases.get(name)}
            for name, own in self.settings.items()
        ]
        above = {name: asdict(own) for name, own in self.own.items()}
        figures = {'batch_size': self.batch_size, 'rounds': self.rounds, 'rows': rows, 'methods': methods}
        return {**figures, 'own_work': above}

    def _own_work(self) -> str:
        """What the methods take above their passes, as text."""
        lines = [
            (name, f'{100 * own.median:+.1f}', f'{100 * own.low:+.1f} to {100 * own.high:+.1f}')
            for name, own in self.own.items()
        ]
        return columns([('above the passes alone, % of a base step', 'median', 'quartiles'), *lines])

    def _quantization_cost(self) -> str:
        """What a step of the base optimizer costs more on the quantized model than on the float one, in words."""
        pairs = zip(self.times['base'], self.times[FLOAT], strict=True)
        ratio = quartiles([quantized / plain for quantized, plain in pairs])
        return f'base, quantized over float: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})'


def measure_table(
    cfg: Config,
    settings: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    rounds: int,
    warmup: int,
    *,
    floors: bool = False,
) -> Table:
    """Measure all methods: step times first, then memory, then phases, each in steps of their own.

    Args:
        cfg: The whole training config, whose data files are there.
        settings: Config of each method's optimizer wrapper, by name; ``'base'`` is what the others are compared with.
        batch_size: Samples a step.
        rounds: Timed steps of each method, at least; it becomes whole refresh cycles.
        warmup: Steps of each method before, at least 1.
        floors: Time the passes of each method alone, too.

    Raises:
        UsageError: The data set is smaller than a batch, a method does not work with this model, or a loss is not
            finite.
    """
    limits: dict[str, Any] = {name: step_limit(cfg, own, batch_size) for name, own in settings.items()}
    cycle = max(limit.refresh for limit in limits.values())
    rounds, few = (-(-number // cycle) * cycle for number in (rounds, -(-rounds // _PHASE_SHARE)))
    subject = load_subject(cfg, batch_size)
    own = {name: dict(wrapper) for name, wrapper in settings.items()}
    if floors:
        found = _floors(cfg, settings, batch_size)
        own |= found
        # Without their refreshes: that is the step which they are compared with.
        limits |= {name: StepLimit(*[limits[name.removesuffix(SUFFIX)].step] * 2) for name in found}
    if subject.float_model is not None:
        own, limits = {FLOAT: own['base'], **own}, {FLOAT: None, **limits}
    times = subject.measure(own, rounds, warmup)
    refresh = {name: 1 if limit is None else limit.refresh for name, limit in limits.items()}
    methods = {name: wrapper for name, wrapper in own.items() if not name.endswith(SUFFIX)}
    peaks = {name: subject.peak_memory(name, own[name], steps=refresh[name]) for name in methods}
    phases = typical(subject.measure_phases(methods, few), limits, done=1)
    rows = compare(times, limits, batch_size, steps_before=warmup, peaks=peaks)
    return Table(batch_size, rounds, rows, phases, own, times, own_work(times, limits, warmup))


def _floors(cfg: Config, settings: Mapping[str, Mapping[str, Any]], batch_size: int) -> dict[str, dict[str, Any]]:
    """The floors under the methods that have one, with all settings, by name."""
    whole = {name + SUFFIX: whole_settings(cfg, own) for name, own in settings.items() if name not in PEERS}
    return {name: own for name, own in whole.items() if passes_of(own['type'], own, batch_size) is not None}
