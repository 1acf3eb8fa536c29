"""The host's own time of a step: what it costs where the model itself costs next to nothing (ours).

On small and fast models it is what users pay. The model is a convolution, a BatchNorm and a layer, a few thousand
weights in all; a step of the base optimizer on it is Python and calls of kernels, and nearly no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from mm_sharp.analysis.benchmark.compare import Row, compare
from mm_sharp.analysis.benchmark.methods import Method, all_settings, limit_of
from mm_sharp.analysis.benchmark.steps import Candidate, measure_rounds

BATCH_SIZE = 16
_BATCHES = 8
_CLASSES = 10


class SmallModel(BaseModel):  # type: ignore[misc]
    """A classifier of pictures (N, 3, 8, 8), with 3,164 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()
        )
        self.fully_connected = nn.Sequential(nn.Linear(256, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, _CLASSES))
        self.loss_module = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, labels: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        """The loss; ``sample_idx`` is for AUSAM."""
        scores = self.fully_connected(self.features(inputs))
        return {'loss': self.loss_module(scores, labels)} if mode == 'loss' else scores


def measure_host(methods: Sequence[Method], rounds: int, warmup: int, device: torch.device) -> list[Row]:
    """Time whole steps on :class:`SmallModel`, of all methods in turn.

    Args:
        methods: The base optimizer first.
        rounds: Timed steps of each method.
        warmup: Steps of each method before; at least 1.
        device: Where they run.

    Returns:
        As :func:`mm_sharp.analysis.benchmark.compare.compare` gives them; limits are those by arithmetic.
    """
    settings = {method.name: all_settings(method) for method in methods}
    candidates = [_contestant(name, given, device) for name, given in settings.items()]
    longest = max(limit_of(given['type'], given, BATCH_SIZE).refresh for given in settings.values())
    rounds = -(-rounds // longest) * longest
    times = measure_rounds(candidates, _batches(device), rounds, warmup, device)
    limits = {name: limit_of(given['type'], given, BATCH_SIZE) for name, given in settings.items()}
    return compare(times, limits, BATCH_SIZE, warmup)


def _contestant(name: str, settings: Mapping[str, Any], device: torch.device) -> Candidate:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallModel().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    wrapper: OptimWrapper = OPTIM_WRAPPERS.build({**settings, 'optimizer': optimizer})
    wrapper.initialize_count_status(model, 0, 1)
    return Candidate(name, model, wrapper)


def _batches(device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(_BATCHES):
        inputs = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator).to(device)
        labels = torch.randint(_CLASSES, (BATCH_SIZE,), generator=generator).to(device)
        # The ids stay on the host, where data samples hold them, too.
        ids = torch.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        batches.append({'inputs': inputs, 'labels': labels, 'sample_idx': ids})
    return batches
