"""An exported file against its model: what was found, and whether it is within the tolerances (ours).

What is judged, and how far it may be off:

- One layer at a time, no integer may differ by more than one step, and 99.9 % must be equal. Right exports have 99.99 %
  and more; a wrong scale, bias or operator is far below.
- 90 % of the keypoints must be within a pixel of the network's input. The demo's had 97 % and more.
- Each metric may differ by 0.1 points (0.001), or by one person where there are fewer than 1,000 of them. Parts of a
  metric ('coco/AP .5', 'coco/AR (L)', 'Head PCK': names with a blank) are reported and not judged: they are about few
  people, or about one threshold. A metric that is 0 in both says nothing of the file: it is a warning. Where all
  are, the keypoints decide alone, and may then be a pixel apart on average.

How many integers differ when the whole network ran is reported and not judged: at 8 bits a deep network makes many
integers differ out of a single flip, and still finds the same keypoints. What that means for the user is in the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .integer_check import Agreement, LayerAgreement
from .prediction_check import OutputAgreement

LARGEST_STEP = 1
EQUAL_SHARE = 0.999
METRIC_TOLERANCE = 0.001
KEYPOINT_PIXELS = 1.0
KEYPOINT_SHARE = 0.9
_PROGRAMS = {'qcdq': 'ONNX Runtime', 'qonnx': 'qonnx'}


@dataclass(frozen=True)
class ExportReport:
    """What a comparison found.

    Args:
        file: The ONNX file.
        file_format: ``'qcdq'`` or ``'qonnx'``.
        samples: How many people both programs were run on.
        layers: Agreement of every quantized activation.
        outputs: Agreement of the model's outputs.
        distances: (people, keypoints): pixels of the network's input between both programs' keypoints.
        metrics: By name, PyTorch's value and the export's.
    """

    file: str
    file_format: str
    samples: int
    layers: Sequence[LayerAgreement]
    outputs: Sequence[OutputAgreement]
    distances: Sequence[Sequence[float]]
    metrics: Mapping[str, tuple[float, float]]

    @property
    def tolerance(self) -> float:
        """How far a metric may be off: a fraction."""
        return max(METRIC_TOLERANCE, 1 / self.samples)

    def total(self, kind: str) -> Agreement:
        """Agreement over all layers; ``kind`` is ``'network'`` or ``'alone'``."""
        parts = [getattr(layer, kind) for layer in self.layers]
        largest = max((part.largest for part in parts), default=0)
        return Agreement(sum(part.values for part in parts), sum(part.equal for part in parts), largest)

    def faults(self) -> list[str]:
        """What is beyond the tolerances, in words; empty if the export agrees."""
        alone = self.total('alone')
        found = []
        if alone.share < EQUAL_SHARE:
            found.append(
                f'given the same input, only {alone.share:.2%} of the integers are equal (at least {EQUAL_SHARE:.1%})'
            )
        worst = max(self.layers, key=lambda layer: layer.alone.largest, default=None)
        steps = 0 if worst is None else worst.alone.largest
        if worst is not None and steps > LARGEST_STEP:
            found.append(
                f'{worst.layer}: given the same input, integers differ by {steps} steps (at most {LARGEST_STEP})'
            )
        found += [f'{output.name} is not finite' for output in self.outputs if not math.isfinite(output.largest)]
        found += self._keypoint_faults()
        for name, (ours, theirs) in self._judged().items():
            if not _difference(ours, theirs) <= self.tolerance * max(1.0, abs(ours)) + 1e-9:
                found.append(
                    f'{name} is {theirs:.4f} and in PyTorch {ours:.4f} (they may differ by {self.tolerance:g})'
                )
        return found

    def warnings(self) -> list[str]:
        """What the comparison could not show, in words."""
        silent = [name for name in self._judged() if not self._tells(name)]
        if not silent:
            return []
        return [
            f'{", ".join(silent)} of both programs is 0 or not a number, which says nothing of the file (is the '
            'checkpoint trained, and is it of this data?): the keypoints were compared instead'
        ]

    def by_what(self) -> str:
        """How near the keypoints and the metrics are, as the end of a sentence; empty where there is neither."""
        distances = np.asarray(self.distances)
        parts = [f'the keypoints differ by {distances.mean():.2g} pixels on average'] if distances.size else []
        parts += [f'{name} {theirs:.4g} (PyTorch: {ours:.4g})' for name, (ours, theirs) in self._judged().items()]
        return f': {"; ".join(parts)}' if parts else ''

    def _judged(self) -> dict[str, tuple[float, float]]:
        return {name: values for name, values in self.metrics.items() if ' ' not in name}

    def _tells(self, name: str) -> bool:
        return any(value > 0 for value in self.metrics[name])

    def _keypoint_faults(self) -> list[str]:
        distances = np.asarray(self.distances)
        if not distances.size:
            return []
        share, mean = float((distances <= KEYPOINT_PIXELS).mean()), float(distances.mean())
        if share < KEYPOINT_SHARE or not np.isfinite(distances).all():
            return [
                f"only {share:.1%} of the keypoints are within {KEYPOINT_PIXELS:g} pixel of PyTorch's (at least "
                f'{KEYPOINT_SHARE:.0%}); they are up to {distances.max():.3g} apart'
            ]
        if mean > KEYPOINT_PIXELS and not any(map(self._tells, self._judged())):
            return [f"keypoints are {mean:.3g} pixels from PyTorch's on average (at most {KEYPOINT_PIXELS:g})"]
        return []

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain values."""
        distances = np.asarray(self.distances)
        return {
            'file': self.file,
            'format': self.file_format,
            'samples': self.samples,
            'agrees': not self.faults(),
            'faults': self.faults(),
            'warnings': self.warnings(),
            'integers': {kind: _figures(self.total(kind)) for kind in ('network', 'alone')},
            'layers': [
                {'layer': layer.layer, 'network': _figures(layer.network), 'alone': _figures(layer.alone)}
                for layer in self.layers
            ],
            'outputs': [asdict(output) for output in self.outputs],
            'keypoints': {
                'largest_px': float(distances.max(initial=0.0)),
                'mean_px': float(distances.mean()) if distances.size else 0.0,
                'within_1px': float((distances <= KEYPOINT_PIXELS).mean()) if distances.size else 1.0,
            },
            'metrics': {
                name: {'pytorch': ours, 'exported': theirs, 'difference': _difference(ours, theirs)}
                for name, (ours, theirs) in self.metrics.items()
            },
            'tolerance': self.tolerance,
        }

    def table(self) -> str:
        """For people."""
        figures = self.as_dict()
        lines = [
            f'{self.file_format.upper()} in {_PROGRAMS[self.file_format]} against PyTorch, {self.samples} people',
            '',
            f'{"integers of " + str(len(self.layers)) + " layers":<26}{"equal":>11}  largest difference, worst layer',
        ]
        for kind, title in (('network', 'whole network'), ('alone', 'one layer at a time')):
            total, worst = self.total(kind), min(self.layers, key=lambda layer: getattr(layer, kind).share)
            share = f'{getattr(worst, kind).share:.4%} in {worst.layer}'
            lines.append(f'{title:<26}{total.share:>11.4%}  {total.largest} steps, {share}')
        lines += ['', f'{"output":<26}{"largest difference":>18}  values in PyTorch']
        lines += [f'{o.name:<26}{o.largest:>18.3g}  {o.low:.3g} to {o.high:.3g}' for o in self.outputs]
        points = figures['keypoints']
        lines.append(
            f'{"keypoints, input pixels":<26}{points["largest_px"]:>18.3g}  '
            f'mean {points["mean_px"]:.3g}; {points["within_1px"]:.2%} within 1'
        )
        lines += ['', f'{"metric":<26}{"PyTorch":>11}{"exported":>11}{"difference":>12}']
        for name, (ours, theirs) in self.metrics.items():
            lines.append(f'{name:<26}{ours:>11.4f}{theirs:>11.4f}{theirs - ours:>12.4f}')
        return '\n'.join(lines)


def _figures(agreement: Agreement) -> dict[str, float]:
    return {'values': agreement.values, 'equal': agreement.share, 'largest_steps': agreement.largest}


def _difference(ours: float, theirs: float) -> float:
    return 0.0 if ours == theirs or (math.isnan(ours) and math.isnan(theirs)) else abs(theirs - ours)
