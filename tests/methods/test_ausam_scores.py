"""What AUSAM's scores are worth: loss differences beside true gradient norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam

from mm_sharp import AUSAMOptimWrapper
from tests.toys import Batch, ToyNet, batches, make


class Classifier(ToyNet):
    """A ``ToyNet`` that tells three classes apart."""

    def __init__(self, norm: bool) -> None:
        super().__init__(norm=norm)
        self.class_loss = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        output = super().forward(inputs, targets, mode='tensor')
        return output if mode != 'loss' else {'loss': self.class_loss(output, targets)}


TASKS = {
    'classification': (Classifier, lambda output: output.argmax(1), F.cross_entropy),
    'regression': (ToyNet, lambda output: 3 * output, lambda o, t: F.mse_loss(o, t) + 0.01 * o.abs().mean()),
}


def trained(task: str, norm: bool, seed: int, count: int = 256, steps: int = 300) -> tuple[ToyNet, Batch]:
    """A network that has learned what another one's outputs are, and the samples it was trained on."""
    kind, label, _ = TASKS[task]
    (batch,) = batches(1, count, seed=seed)
    with torch.no_grad():
        output = make(seed=77, norm=False)(batch['inputs'], batch['targets'], mode='tensor')
    batch['targets'] = label(output - output.mean(0))
    model = make(kind, seed=seed, norm=norm)
    wrapper = OptimWrapper(Adam(model.parameters(), lr=0.01))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(count, (32,), generator=generator)
        model.train_step({name: value[rows] for name, value in batch.items()}, wrapper)
    return model, batch


def gradient_norms(task: str, model: ToyNet, batch: Batch) -> np.ndarray:
    """The norm of each sample's own gradient, with evaluation statistics."""
    criterion = TASKS[task][2]
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Any:
        arguments = (inputs[None], targets[None])
        output = torch.func.functional_call(model, (parameters, buffers), arguments, {'mode': 'tensor'})
        return criterion(output, targets[None])

    model.eval()
    detached = {name: weight.detach() for name, weight in weights.items()}
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, batch['inputs'], batch['targets'])
    model.train()
    norms: np.ndarray = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1).numpy()
    return norms


def scores_after(model: ToyNet, batch: Batch, size: int, steps: int) -> np.ndarray:
    """|l_i(w + e) - l_i(w)| averaged over ``steps`` batches of ``size``, as AUSAM's history has it."""
    wrapper = AUSAMOptimWrapper(SGD(model.parameters(), lr=0.0), sampling_ratio=1.0)
    generator = torch.Generator().manual_seed(5)
    count = len(batch['inputs'])
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-steps * size // count))])
    for rows in order[: steps * size].split(size):
        model.train_step({name: value[rows] for name, value in batch.items()}, wrapper)
    wrapper.exchange_history()
    scores: np.ndarray = wrapper.history.scores([('', i) for i in range(count)])
    return scores


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks (there are no ties among floats like these)."""
    ranks = [values.argsort().argsort().astype(float) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([0.1, 5.0, 7.0]), np.array([1.0, 2.0, 900.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


@pytest.mark.parametrize('seed', [0, 1])
def test_loss_differences_rank_samples_as_their_gradient_norms_do(seed: int, record_property: Any) -> None:
    """Without BatchNorm, on a network that has learned its task: one pass over all samples, and AUSAM's averages."""
    model, batch = trained('classification', norm=False, seed=seed)
    norms = gradient_norms('classification', model, batch)
    once, averaged = scores_after(model, batch, 256, 1), scores_after(model, batch, 16, 64)
    record_property('one pass over all samples', rank_correlation(once, norms))
    record_property('history of batches of 16', rank_correlation(averaged, norms))
    assert rank_correlation(once, norms) >= 0.9
    assert rank_correlation(averaged, norms) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'norm'), [('classification', True), ('regression', False), ('regression', True)])
def test_figures_that_are_reported_as_they_are(task: str, norm: bool, record_property: Any) -> None:
    """BatchNorm mixes the samples of a batch; in regression near its end one direction says little of each sample."""
    model, batch = trained(task, norm=norm, seed=0)
    norms = gradient_norms(task, model, batch)
    for name, scores in (
        ('one pass over all samples', scores_after(model, batch, 256, 1)),
        ('one pass in batches of 32', scores_after(model, batch, 32, 8)),
        ('history of batches of 16', scores_after(model, batch, 16, 64)),
    ):
        correlation = rank_correlation(scores, norms)
        record_property(name, correlation)
        assert 0 < correlation < 1
