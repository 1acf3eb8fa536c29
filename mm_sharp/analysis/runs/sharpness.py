"""How sharp the loss is around the checkpoints of runs, by one measure for all: that of SAM's own step."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.runs.trained_run import Curve, TrainedRun
from mm_sharp.analysis.sharpness.loading import load_model, load_samples
from mm_sharp.methods.sam import SAMOptimWrapper

# The radius of configs/_base_/sam.py, relative to the weights.
RHO = 0.02


def rises(run: TrainedRun, count: int, batch_size: int = 32, rho: float = RHO) -> Curve:
    """L(w + e) - L(w) at each checkpoint, on so many training samples, with BatchNorm's running statistics.

    e is SAM's perturbation with ``adaptive='tensor'`` and ``perturb='weights'``, whatever the run was trained with, so
    that runs can be compared.

    Returns:
        Epochs, and the mean over the batches, in units of the loss.
    """
    with prepared(run.cfg):
        samples = load_samples(run.cfg, 'train', count, seed=0)
    found = []
    for epoch, file in run.checkpoints.items():
        model, _, _ = load_model(run.cfg, str(file))
        # No step is made: only the two passes count.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        wrapper = SAMOptimWrapper(optimizer, rho=rho, adaptive='tensor', perturb='weights')
        model.eval()
        differences = []
        with prepared(run.cfg, epoch):
            for _, batch in samples.batches(batch_size):
                differences.append(_rise(model, batch, wrapper))
        found.append((epoch, fmean(differences)))
    return found


def _rise(model: Any, batch: Any, wrapper: SAMOptimWrapper) -> float:
    model.train_step(batch, wrapper)
    step = wrapper.last_step
    assert step is not None
    assert step.perturbed_loss is not None
    return float(step.perturbed_loss - step.loss)
