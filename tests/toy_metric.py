"""A metric of the toy model."""

from __future__ import annotations

from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The mean output."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(sample.mean()) for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {'mean': sum(results) / len(results)}
