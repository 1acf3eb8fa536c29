"""ESAM: sharpness-aware minimization with less work in both passes.

ESAM (Du et al. 2022, arXiv 2110.03141), with forward = 1 and backward = 2 units of cost, of which half are the weights'
gradients:

- *Stochastic weight perturbation* (SWP): each parameter tensor takes part in the perturbation with probability
  ``beta``; the others get no gradient in the first pass at all, and ``e`` is scaled by 1 / beta.
- *Sharpness-sensitive data selection* (SDS): the second pass differentiates the ``ceil(gamma * N)`` samples whose loss
  the perturbation raises most, ``l_i(w + e) - l_i(w)``, for which a forward without gradients runs on the whole batch.

A step costs (3 + beta + 3 * gamma) / 3 of the base optimizer's: 1.70 at (0.6, 0.5). (The paper reports 1.40.)

Ours: ``selection='history'`` takes the samples with the largest *average* loss difference instead, which needs no extra
forward: (2 + beta + 3 * gamma) / 3, 1.37. Since BatchNorm makes losses on different sets of samples incomparable, the
averages are measured by an exact selection every ``refresh`` steps, and only then. Samples not measured yet rank at the
mean of the batch's measured ones; equal ones are taken at random. Also ours: exactly ``ceil(gamma * N)`` samples are
kept (the authors' code compares with a strict ``>``, and keeps floor(gamma * N) - 1), and at least one tensor is always
perturbed.

A loss that is the sum of its samples' is scaled by N / K, so that a step is as long as on the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_choice, check_number, check_positive_int
from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.perturbation import Direction, weight_mask
from mm_sharp.per_sample_loss import Reduction
from mm_sharp.samples.history import Keys
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.samples.seeds import RngStream
from mm_sharp.samples.selection import FloatArray, IntArray, batch_figures, sample_count, top_k
from mm_sharp.samples.subset import call_size, one_is_enough, subset
from mm_sharp.step.checks import check_compiled
from mm_sharp.step.method import Cost


@OPTIM_WRAPPERS.register_module()
class ESAMOptimWrapper(PerSampleOptimWrapper):
    """Efficient sharpness-aware minimization as an MMEngine optimizer wrapper.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation; 0.05 is the authors' for ResNet-18 on CIFAR (WideResNet-28-10: 0.1, PyramidNet:
            0.2).
        beta: Probability of each parameter tensor to be perturbed, in (0, 1]; 0.6 is the authors' for ResNet-18 on
            CIFAR (the two others: 0.5).
        gamma: Share of the samples in the second pass, in (0, 1]; K = ceil(gamma * N). 0.5 is the authors'.
            With 1 nothing is selected, and no losses of samples are needed. K is at least 2 (of several) where the
            model has a ``BatchNorm1d``, which cannot normalise a single row (ours).
        selection: ``'exact'``, by the loss increase measured in this step (the paper's; on a GPU the host waits for it
            once a step), or ``'history'``, by the average loss difference of earlier steps (ours).
        refresh: With ``'history'``, one step in so many selects exactly and writes the history (ours).
        kwargs: The other arguments of :class:`mm_sharp.step.wrapper.TwoPassOptimWrapper`, and ``history_momentum``,
            which is that of :class:`mm_sharp.methods.ausam.AUSAMOptimWrapper` (ours).

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    # Under FSDP all the same, of all.
    skips_gradients: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        selection: str = 'exact',
        refresh: int = 10,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        self.beta = check_number(name, 'beta', beta, high=1.0, low_open=True, example='0.6')
        self.gamma = check_number(name, 'gamma', gamma, high=1.0, low_open=True, example='0.5')
        check_choice(name, 'selection', selection, ('exact', 'history'))
        self.selection = selection
        self.refresh = check_positive_int(name, 'refresh', refresh, example='10')
        super().__init__(optimizer, rho=rho, **kwargs)
        self._size = 0
        self._checked: nn.Module | None = None  # the model that was found not to be compiled, or not in the way
        self._keys: Keys = []
        # What decides the factor on a subset's loss; any recorded step shows it.
        self._reductions: set[Reduction] = set()

    @classmethod
    def theoretical_cost(
        cls,
        batch_size: int,
        beta: float = 0.6,
        gamma: float = 0.5,
        selection: str = 'exact',
        refresh: int = 10,
        **settings: Any,
    ) -> Cost:
        """(2 + beta + 3 * gamma) / 3, and 1/3 for the selection's forward: in each step, or in one of ``refresh``."""
        share = sample_count(gamma, batch_size) / batch_size
        passes, selecting = (2 + beta + 3 * share) / 3, (1 if share < 1 else 0) / 3
        if selection == 'exact' or refresh == 1 or share == 1:
            return Cost(passes + selecting, passes + selecting)
        return Cost(passes, passes + selecting / refresh, refresh)

    def in_words(self, batch_size: int, length: TrainingLength, model: nn.Module | None) -> dict[str, str]:
        """See :meth:`mm_sharp.step.method.Method.in_words`."""
        chance = f'; each tensor with probability {self.beta:g}' if self.beta < 1.0 else ''
        lines = {'perturbed': f'{self.selector.in_words}{chance}'}
        if self.gamma == 1.0:
            return lines
        k = sample_count(self.gamma, batch_size, self._fewest[1])
        how = f'by their history, measured in one step of {self.refresh}' if self.uses_history else 'measured each step'
        samples = f'all {batch_size} in the first pass; in the second the {k} whose loss rises most, {how}'
        return {**lines, 'samples': samples, **self.losses_in_words(model)}

    @property
    def uses_history(self) -> bool:
        """Only ``selection='history'`` does, and where all samples are kept it has nothing to select."""
        return self.selection == 'history' and self.gamma < 1.0

    @property
    def same_samples(self) -> bool:
        """Where the samples are selected by their history, L(w + e) is that of those selected."""
        return not self.uses_history

    def first_batch(self, call: ModelCall) -> ModelCall:
        """The whole batch, the samples of which must have ids with ``selection='history'``."""
        self.pending_updates.flush()
        self._size = call_size(type(self).__name__, call)
        self._keys = self.keys(call, self._size) if self.uses_history else []
        return call

    def select_parameters(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Each of ``parameters`` with probability ``beta``, the same ones on all ranks."""
        mask = weight_mask(len(parameters), self.beta, self.generator(RngStream.MASK, shared=True))
        return [parameter for parameter, taken in zip(parameters, mask, strict=True) if taken]

    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Direction:
        """SAM's, times 1 / beta."""
        direction = super().direction(weights, gradients)
        return replace(direction, rho=direction.rho * (1.0 / self.beta))

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the losses of the first pass, where this step needs them."""
        if self._checked is not model:
            check_compiled(type(self).__name__, model, sees_losses=self.gamma < 1.0, switches=self.beta < 1.0)
            self._checked = model
        if self.gamma < 1.0 and self.losses_of(model).look_again():
            self._reductions = set()
        if self.gamma == 1.0 or (not self._measures and self._reductions):
            self._record = None
            yield
            self._flush_checks()
            return
        with super().recording(model):
            yield
        self._reductions = {term.reduction for term in self.record().terms}

    def perturbed_loss(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The second forward, on the samples that are selected."""
        count = sample_count(self.gamma, self._size, self.fewest(call.model))
        # Other ranks may have more samples and select: a forward that communicates (SyncBatchNorm) needs all of them.
        if count == self._size and (self.gamma == 1.0 or get_world_size() == 1):
            return super().perturbed_loss(call, loss, norm)
        rows: IntArray | Tensor
        whole: Tensor | None = None
        if self._measures:
            differences, increases, whole = self._measure(call, loss, norm)
            with self.exclude_from_timing('recording'):
                rows = top_k(increases, count)
            self._metrics = partial(_metrics_of, differences)
        else:
            with self.exclude_from_timing('recording'):
                if not self._reductions:  # no step was measured yet: say now if the losses of samples cannot be told
                    self.record().losses(loss)
                rows, scores = self._choose_by_history(count)
            self._metrics = partial(_metrics_of, scores)
        with one_is_enough(type(self).__name__, 'gamma', lambda: (count, self._size)):
            second = self._loss_on(call, rows, count)
        return second, second.detach() if whole is None else whole

    @property
    def _measures(self) -> bool:
        """Whether this step selects by the increase that it measures itself."""
        return self.selection == 'exact' or self.steps % self.refresh == 0

    def _measure(self, call: ModelCall, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A forward without gradients: the loss differences, (N,); the increases to select by, (N,); L(w + e)."""
        with self.exclude_from_timing('recording'):
            before = self.record().losses(loss)
        with self.losses_of(call.model).record() as record:
            whole = self.second_pass.loss_without_gradient(call)
        with self.exclude_from_timing('recording'):
            after = record.losses(whole)
            differences = self.differences(before, after, norm)
            if self.uses_history:
                self.visit(self._keys, differences)
            # A sample whose loss is not finite would take the step with it: it comes last, behind all others.
            increases = after - before
            return differences, increases.where(increases.isfinite(), -torch.inf), whole

    def _choose_by_history(self, count: int) -> tuple[IntArray, FloatArray]:
        """The samples with the largest average loss difference, and the averages, (N,), NaN where not measured yet."""
        scores = self.history.scores(self._keys)
        measured = ~np.isnan(scores)
        neutral = scores[measured].mean() if measured.any() else 0.0
        # In random order, since of equal ones the first are taken.
        order = torch.randperm(self._size, generator=self.generator(RngStream.TIES)).numpy()
        ranked = torch.from_numpy(np.where(measured, scores, neutral)[order])
        return np.sort(order[top_k(ranked, count).numpy()]), scores

    def _loss_on(self, call: ModelCall, rows: IntArray | Tensor, count: int) -> Tensor:
        """The loss of ``count`` samples at the weights as they are now, as long as the whole batch's."""
        with self.exclude_from_timing('recording'):
            part = subset(call, rows, self._size)
        if len(self._reductions) == 1:
            (reduction,) = self._reductions
            return self.second_pass.loss(part) * reduction.subset_factor(count, self._size)
        # Sums and means in one model: each loss module is scaled by itself.
        with self.losses_of(call.model).record(full_size=self._size):
            return self.second_pass.loss(part)


def _metrics_of(differences: Tensor | FloatArray) -> dict[str, float]:
    """Figures for the log, of loss differences (N,), NaN where unknown."""
    scores = torch.as_tensor(differences).cpu().numpy().astype(np.float64)
    known = scores[np.isfinite(scores)]
    return {'mean_difference': float(known.mean()), **batch_figures(np.abs(known), known)} if len(known) else {}
