"""The host's own time of a step: what it costs where the model itself costs next to nothing.

It is what users of small models pay: a step on the model here is Python and calls of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseModel
from torch import Tensor, nn

from mm_sharp.analysis.benchmark.compare import Row, compare
from mm_sharp.analysis.benchmark.methods import theoretical_cost
from mm_sharp.analysis.benchmark.steps import step_seconds
from mm_sharp.analysis.benchmark.table import whole_cycles
from mm_sharp.analysis.benchmark.workload import Workload
from mm_sharp.analysis.prepare import prepared

BATCH_SIZE = 16


class SmallModel(BaseModel):  # type: ignore[misc]
    """A classifier of pictures (N, 3, 8, 8), with 3,164 weights."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        features = (convolution, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.layers = nn.Sequential(*features, nn.Linear(256, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 10))
        self.loss_module = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, labels: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        """The loss; ``sample_idx`` is for AUSAM."""
        return {'loss': self.loss_module(self.layers(inputs), labels)}


def measure_host(methods: Mapping[str, Mapping[str, Any]], rounds: int, warmup: int) -> list[Row]:
    """Time at least so many whole steps on :class:`SmallModel`, of all methods in turn, the base optimizer first."""
    optimizer = {'type': 'SGD', 'lr': 0.0, 'momentum': 0.9}
    settings = {name: {**method, 'optimizer': optimizer} for name, method in methods.items()}
    costs = {name: theoretical_cost(own, BATCH_SIZE) for name, own in settings.items()}
    device = torch.device(get_device())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        workload = Workload(SmallModel().to(device).train(), [_batch(number, device) for number in range(8)])
    with prepared(Config()):
        times = workload.measure(settings, whole_cycles(rounds, costs), warmup, step_seconds)
    return compare(times, costs, BATCH_SIZE, warmup)


def _batch(number: int, device: torch.device) -> dict[str, Tensor]:
    # The ids stay on the host, where data samples hold them, too.
    ids = torch.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
    inputs, labels = torch.randn(BATCH_SIZE, 3, 8, 8), torch.randint(10, (BATCH_SIZE,))
    return {'inputs': inputs.to(device), 'labels': labels.to(device), 'sample_idx': ids}
