"""What a comparison of an exported file with its model found, and whether it is within the tolerances.

One layer at a time, no integer may differ by more than one step, and 99.9 % must be equal (right exports: 99.99 %).
90 % of the keypoints must be within a pixel of the network's input. Each metric may differ by 0.001, or by one person
of fewer than 1,000; parts of a metric (names with a blank: 'coco/AP .5') are not judged. One that is 0 in both is a
warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_STEP = 1
EQUAL_SHARE = 0.999
METRIC_TOLERANCE = 0.001
KEYPOINT_PIXELS = 1.0
KEYPOINT_SHARE = 0.9
_ADVICE = (
    '. Each layer by itself agrees, so the file is right, and rounding alone moves the keypoints of this model: '
    'fine-tune it, calibrate it on more batches, or give it more bits (w8a8); see docs/export.md'
)
_PROGRAMS = {'qcdq': 'ONNX Runtime', 'qonnx': 'qonnx', 'float': 'ONNX Runtime'}


@dataclass
class Agreement:
    """How many integers were compared, how many are equal, and the largest difference in quantization steps."""

    values: int = 0
    equal: int = 0
    largest: int = 0

    @property
    def share(self) -> float:
        """Fraction of equal integers, 1 if there are none."""
        return self.equal / self.values if self.values else 1.0

    def add(self, ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        """Compare two arrays of the same shape."""
        difference = np.abs(ours - theirs)
        self.values += difference.size
        self.equal += int((difference == 0).sum())
        self.largest = max(self.largest, int(difference.max(initial=0)))

    def as_dict(self) -> dict[str, float]:
        """In plain values."""
        return {'values': self.values, 'equal': self.share, 'largest_steps': self.largest}


@dataclass
class LayerAgreement:
    """A quantized activation in both programs."""

    layer: str  # name of its quantizer in the model
    network: Agreement = field(default_factory=Agreement)  # when the whole network ran in each program
    alone: Agreement = field(default_factory=Agreement)  # when the exported layer was given PyTorch's integers


@dataclass
class OutputAgreement:
    """One of the model's outputs, which are float: the largest difference, and the range of PyTorch's values."""

    name: str
    largest: float = 0.0
    low: float = float('inf')
    high: float = float('-inf')
    varies: bool = True  # whether it is not the same for all people

    def __post_init__(self) -> None:
        self._first: Any = None

    def add(self, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
        """Compare a batch; a value that is not finite makes the difference infinite."""
        if self._first is None:
            self._first, self.varies = ours[0], False
        self.varies = self.varies or bool((ours != self._first).any())
        difference = np.abs(ours - theirs)
        self.largest = max(self.largest, float(difference.max()) if np.isfinite(difference).all() else np.inf)
        self.low, self.high = min(self.low, float(ours.min())), max(self.high, float(ours.max()))


@dataclass(frozen=True)
class ExportReport:
    """What a comparison found."""

    file: str
    file_format: str
    samples: int  # how many people both programs were run on
    layers: Sequence[LayerAgreement]
    outputs: Sequence[OutputAgreement]
    distances: Sequence[Sequence[float]]  # (people, keypoints): pixels of the network's input between the programs'
    metrics: Mapping[str, tuple[float, float]]  # by name, PyTorch's value and the export's

    @property
    def tolerance(self) -> float:
        """How far a metric may be off: a fraction."""
        return max(METRIC_TOLERANCE, 1 / self.samples)

    def faults(self) -> list[str]:
        """What is beyond the tolerances, in words; empty if the export agrees."""
        found, alone, points = [], self._total('alone'), self._keypoints()
        if alone.share < EQUAL_SHARE:
            found.append(
                f'given the same input, only {alone.share:.2%} of the integers are equal (at least {EQUAL_SHARE:.1%})'
            )
        if alone.largest > LARGEST_STEP:
            worst = max(self.layers, key=lambda layer: layer.alone.largest).layer
            found.append(
                f'{worst}: given the same input, integers differ by {alone.largest} steps (at most {LARGEST_STEP})'
            )
        found += [f'{output.name} is not finite' for output in self.outputs if not math.isfinite(output.largest)]
        if points['within_1px'] < KEYPOINT_SHARE or not math.isfinite(points['largest_px']):
            advice = '' if found or not self.layers else _ADVICE
            found.append(
                f"only {points['within_1px']:.1%} of the keypoints are within {KEYPOINT_PIXELS:g} pixel of PyTorch's "
                f'(at least {KEYPOINT_SHARE:.0%}), and they are up to {points["largest_px"]:.3g} apart{advice}'
            )
        for name, (ours, theirs) in self._judged().items():
            if not _difference(ours, theirs) <= self.tolerance * max(1.0, abs(ours)) + 1e-9:
                found.append(
                    f'{name} is {theirs:.4f} and in PyTorch {ours:.4f} (they may differ by {self.tolerance:g})'
                )
        return found

    def warnings(self) -> list[str]:
        """What the comparison could not show, in words."""
        found = []
        same = [output.name for output in self.outputs if not output.varies]
        if same and self.samples > 1:
            found.append(
                f'{", ".join(same)}: the same for all {self.samples} people, so that both programs agree says nothing '
                'of the file (is the checkpoint trained?)'
            )
        silent = [name for name, values in self._judged().items() if not any(value > 0 for value in values)]
        if silent:
            found.append(
                f'{", ".join(silent)} of both programs is 0 or not a number, which says nothing of the file (is the '
                'checkpoint trained, and is it of this data?): the keypoints were compared instead'
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain values."""
        return {
            'file': self.file,
            'format': self.file_format,
            'samples': self.samples,
            'agrees': not self.faults(),
            'faults': self.faults(),
            'warnings': self.warnings(),
            'integers': {kind: self._total(kind).as_dict() for kind in ('network', 'alone')},
            'layers': [
                {'layer': layer.layer, 'network': layer.network.as_dict(), 'alone': layer.alone.as_dict()}
                for layer in self.layers
            ],
            'outputs': [asdict(output) for output in self.outputs],
            'keypoints': self._keypoints(),
            'metrics': {
                name: {'pytorch': ours, 'exported': theirs, 'difference': _difference(ours, theirs)}
                for name, (ours, theirs) in self.metrics.items()
            },
            'tolerance': self.tolerance,
        }

    def table(self) -> str:
        """For people."""
        points = self._keypoints()
        lines = [
            f'{self.file_format.upper()} in {_PROGRAMS[self.file_format]} against PyTorch, {self.samples} people',
            '',
        ]
        if self.layers:
            lines.append(
                f'{f"integers of {len(self.layers)} layers":<26}{"equal":>11}  largest difference, worst layer'
            )
        rows = (('network', 'whole network', ' (not judged)'), ('alone', 'one layer at a time', ''))
        for kind, title, note in rows if self.layers else ():
            total, worst = self._total(kind), min(self.layers, key=lambda layer: getattr(layer, kind).share)
            share = f'{getattr(worst, kind).share:.4%} in {worst.layer}'
            lines.append(f'{title:<26}{total.share:>11.4%}  {total.largest} steps, {share}{note}')
        lines += ['', f'{"output":<26}{"largest difference":>18}  values in PyTorch']
        lines += [f'{o.name:<26}{o.largest:>18.3g}  {o.low:.3g} to {o.high:.3g}' for o in self.outputs]
        lines.append(
            f'{"keypoints, input pixels":<26}{points["largest_px"]:>18.3g}  '
            f'mean {points["mean_px"]:.3g}; {points["within_1px"]:.2%} within 1'
        )
        lines += ['', f'{"metric":<26}{"PyTorch":>11}{"exported":>11}{"difference":>12}']
        for name, (ours, theirs) in self.metrics.items():
            lines.append(f'{name:<26}{ours:>11.4f}{theirs:>11.4f}{theirs - ours:>12.4f}')
        return '\n'.join(lines)

    def _total(self, kind: str) -> Agreement:
        parts = [getattr(layer, kind) for layer in self.layers]
        largest = max((part.largest for part in parts), default=0)
        return Agreement(sum(part.values for part in parts), sum(part.equal for part in parts), largest)

    def _keypoints(self) -> dict[str, float]:
        distances = np.asarray(self.distances)
        within = float((distances <= KEYPOINT_PIXELS).mean())
        return {'largest_px': float(distances.max()), 'mean_px': float(distances.mean()), 'within_1px': within}

    def _judged(self) -> dict[str, tuple[float, float]]:
        return {name: values for name, values in self.metrics.items() if ' ' not in name}


def _difference(ours: float, theirs: float) -> float:
    return 0.0 if ours == theirs or (math.isnan(ours) and math.isnan(theirs)) else abs(theirs - ours)
