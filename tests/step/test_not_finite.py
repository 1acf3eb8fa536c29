"""Values that are not finite, anywhere in a step: no weight takes them up, and the log names the samples."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import Tensor
from torch.optim import SGD

from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from mm_sharp.ops.finite import all_finite, zero_unless
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.corrupted import finite, logged, spoil
from tests.mmpose_cases import CASES, QUIET, set_epoch
from tests.mmpose_cases import build as build_recipe
from tests.reliability import Holds
from tests.toys import NaNSecond, Notes, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import WRAPPERS, build, momentum_sgd

METHODS = ('sam', 'asam', 'friendlysam', 'gsam', 'wsam', 'esam', 'esam-history', 'ausam', 'ausam-reweight')
BAD = {'nan': torch.nan, 'inf': torch.inf}
everywhere = pytest.mark.parametrize('name', METHODS)


def scores(wrapper: TwoPassOptimWrapper) -> list[float]:
    """All averages in the history, with what is on its way into it."""
    if not isinstance(wrapper, PerSampleOptimWrapper):
        return []
    wrapper.pending_updates.flush()
    return [float(a) for table in wrapper.history.state_dict()['data_sets'].values() for a in table['averages']]


@everywhere
@pytest.mark.parametrize(
    ('field', 'value', 'dtype'),
    [('inputs', 'nan', None), ('targets', 'inf', None), ('targets', 'nan', 'float16'), ('inputs', 'inf', 'bfloat16')],
)
def test_a_batch_with_one_bad_sample(name: str, field: str, value: str, dtype: str | None, holds: Holds) -> None:
    model = make()
    # All samples, so that no draw leaves the bad one out.
    wrapper = build(name, model, whole=name != 'esam', dtype=dtype, loss_scale=256.0)
    first, second, third = batches(3)
    model.train_step(first, wrapper)
    before, known = copy.deepcopy(model.state_dict()), len(scores(wrapper))
    with logged() as records:
        model.train_step(spoil(second, field, BAD[value]), wrapper)
    kept = all(same_bits(parameter, before[key]) for key, parameter in model.named_parameters())
    assert kept != (name == 'esam' and field == 'targets'), 'it alone selects, and steps on the samples that are finite'
    if field == 'inputs':  # of the targets BatchNorm has no knowledge
        assert all(same_bits(buffer, before[key]) for key, buffer in model.named_buffers())
    assert finite(model, wrapper)
    assert len(scores(wrapper)) == known
    (record,) = records
    assert record.levelno == logging.WARNING
    assert 'step 2: the loss is ' in record.getMessage()
    assert record.getMessage().endswith('Samples: 11'), 'the sample in row 3 of the second batch of 8'
    model.train_step(third, wrapper)
    assert finite(model, wrapper)
    assert not same_state(model, make())
    if getattr(wrapper, 'uses_history', False):
        assert all(np.isfinite(scores(wrapper)))
    what = f'one sample with {value} in its {field}'
    step = 'buffers put back, no step' if field == 'inputs' else 'steps on the others' if name == 'esam' else 'no step'
    holds('Values that are not finite', what, name, f'{step}; sample named, history without it')


@everywhere
def test_sam_and_the_rest_train_on_as_if_the_bad_batch_had_not_been(name: str) -> None:
    ours, theirs = make(), make()
    options = dict(beta=1.0) if name.startswith('esam') else {}
    wrappers = [build(name, model, whole=True, **options) for model in (ours, theirs)]
    first, second, third = batches(3)
    for batch in (first, spoil(second, 'inputs', torch.nan), third):
        ours.train_step(batch, wrappers[0])
    for batch in (first, third):
        theirs.train_step(batch, wrappers[1])
    assert same_state(ours, theirs)


@everywhere
@pytest.mark.parametrize('value', BAD)
def test_the_perturbed_loss_alone(name: str, value: str, holds: Holds) -> None:
    """Because of the perturbation, so that the base optimizer would not have had it."""
    model = make(NaNSecond, factors=dict.fromkeys((1, 2), BAD[value]))
    wrapper = build(name, model)
    start = make(NaNSecond, factors={})
    with logged() as records:
        model.train_step(batches(1)[0], wrapper)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert not same_state(model, start), 'the first pass was finite: its statistics are as the base optimizer has them'
    assert finite(model, wrapper)
    (record,) = records
    assert 'the loss at the perturbed weights is ' in record.getMessage()
    assert 'the optimizer does not step' in record.getMessage()
    assert not any(np.isinf(scores(wrapper)))
    holds('Values that are not finite', f'{value} in the second pass alone', name, 'no step, event in the log')


class Cliff(ToyNet):
    """Its loss is finite, and its gradient is not: a square root at zero."""

    steep = True

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        if self.steep:
            losses['loss_square'] = losses['loss_square'] + (losses['loss_size'] * 0).sqrt() * 0
        return losses


@pytest.mark.parametrize('name', ['sam', 'esam'])
def test_gradients_alone(name: str, holds: Holds) -> None:
    model = make(Cliff)
    wrapper = build(name, model, **(dict(gamma=1.0, beta=1.0) if name == 'esam' else {}))
    with logged() as records:
        model.train_step(batches(1)[0], wrapper)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), make().parameters(), strict=True))
    assert "the first pass's gradient is not finite; the optimizer does not step" in records[0].getMessage()
    assert records[0].getMessage().endswith('Samples: 0, 1, 2, 3, 4, 5, 6, 7')
    model.steep = False
    model.train_step(batches(1)[0], wrapper)
    assert finite(model, wrapper)
    holds('Values that are not finite', 'gradients that are not, of a finite loss', name, 'no step, event in the log')


class Overflowing(ToyNet):
    """After the first forward, the loss of sample 2 is beyond float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        if self.seen:
            targets = torch.where((sample_idx == 2).unsqueeze(1), 1e30, targets)
        self.seen.append(sample_idx.tolist())
        return super().forward(inputs, targets, sample_idx, mode)


def test_esam_leaves_out_a_sample_that_the_perturbation_makes_infinite(holds: Holds) -> None:
    model = make(Overflowing)
    wrapper = build('esam', model, gamma=0.8)
    with logged() as records:
        model.train_step(batches(1)[0], wrapper)
    first, selecting, second = model.seen
    assert first == selecting == list(range(8))
    assert len(second) == 7
    assert 2 not in second
    assert finite(model, wrapper)
    assert not same_state(model, make(Overflowing))
    assert 'the loss at the perturbed weights is inf; the final gradient is finite' in records[0].getMessage()
    holds('Values that are not finite', 'one sample, by the perturbation', 'esam', 'steps on the other samples')


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name in ('sam', 'esam', 'ausam') else pytest.mark.slow) for name in METHODS]
)
def test_again_and_again(name: str, holds: Holds) -> None:
    model = make()
    wrapper = build(name, model, whole=True)
    start = make()
    with logged() as records:
        for batch in batches(120):
            model.train_step(spoil(batch, 'inputs', torch.nan), wrapper)
    assert same_state(model, start)
    assert scores(wrapper) == []
    assert len(records) == 11, 'ten events, and the hundredth'
    assert '(100 such steps so far; from now on every 100th is logged)' in records[-1].getMessage()
    for batch in batches(3, seed=1):
        model.train_step(batch, wrapper)
    assert finite(model, wrapper)
    assert not same_state(model, start)
    what = 'nan in every batch, 120 times'
    holds('Values that are not finite', what, name, 'nothing changes; 11 lines in the log; trains on', count=120)


@everywhere
@pytest.mark.parametrize('bad', [0, 1])
def test_one_micro_batch_of_a_cycle(name: str, bad: int) -> None:
    """The cycle's step is left out, whichever micro-batch it was, and the next cycle is whole."""
    model = make()
    wrapper = build(name, model, whole=True, accumulative_counts=2)
    start = make()
    first, *others = batches(4)
    cycle = [first, others[0]]
    cycle[bad] = spoil(cycle[bad], 'inputs', torch.nan)
    with logged() as records:
        for batch in cycle:
            model.train_step(batch, wrapper)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert records[0].getMessage().endswith(f'Samples: {8 * bad + 3}')
    if bad == 0:
        assert 'its gradient is part of an accumulated one' in records[0].getMessage()
        assert 'the losses of this batch are; the optimizer does not step' in records[1].getMessage()
    for batch in others[1:]:
        model.train_step(batch, wrapper)
    assert finite(model, wrapper)
    assert not all(same_bits(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))


# ------------------------------------------------------------------ where the host does not know
@everywhere
def test_as_on_an_accelerator(name: str, holds: Holds) -> None:
    """The same branch on the CPU: a step along a gradient of zero; event and buffers when the next step begins."""
    model = make()
    wrapper = build(name, model, SGD(model.parameters(), lr=0.05), whole=True)
    wrapper._two_pass.guard.host_knows = False
    start = make()
    bad, good = batches(2)
    with logged() as records:
        model.train_step(spoil(bad, 'inputs', torch.nan), wrapper)
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
        assert records == []
        assert not all_finite([model.norm.running_mean])
        model.train_step(good, wrapper)
        assert records[0].getMessage().endswith('Samples: 3')
    assert finite(model, wrapper)
    assert model.norm.num_batches_tracked == 1
    assert len(records) == 1
    what = 'one bad sample, in the branch for accelerators'
    holds(
        'Values that are not finite', what, name, 'a gradient of zero; sample named and buffers put back a step later'
    )


@everywhere
def test_the_log_waits_for_no_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not arrived when the next step begins is logged when it has; the first loss is there in any case."""

    class Late(HostCopy):
        ready = False

    monkeypatch.setattr('mm_sharp.step.nonfinite_log.HostCopy', Late)
    model = make()
    wrapper = build(name, model, SGD(model.parameters(), lr=0.05), whole=True)
    wrapper._two_pass.guard.host_knows = False
    bad, *good = batches(3)
    with logged() as records:
        for batch in (spoil(bad, 'inputs', torch.nan), good[0]):
            model.train_step(batch, wrapper)
        assert records == []
        assert finite(model, wrapper)
        Late.ready = True
        model.train_step(good[1], wrapper)
    (record,) = records
    assert 'step 1: ' in record.getMessage()
    assert record.getMessage().endswith('Samples: 3')


def test_all_finite_and_zero_unless() -> None:
    fine = [torch.ones(3), torch.full((2,), 3e38), torch.empty(0), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(fine)
    assert all_finite([])
    sparse = torch.sparse_coo_tensor([[1]], [torch.nan], (4,), check_invariants=False)
    for bad in (torch.tensor([1.0, torch.nan]), torch.tensor(-torch.inf), sparse):
        assert not all_finite([*fine, bad])
    tensors = [torch.tensor([1.0, torch.nan]), torch.ones(2, 2)]
    zero_unless(torch.tensor(True), tensors)
    assert same_bits(tensors[0], torch.tensor([1.0, torch.nan]))
    zero_unless(torch.tensor(False), tensors)
    assert not any(tensor.any() for tensor in tensors)


# ------------------------------------------------------------------ batches of an unusual size, masked targets
@pytest.mark.parametrize('name', WRAPPERS)
def test_a_batch_of_one(name: str, holds: Holds) -> None:
    model = make()
    wrapper = build(name, model)
    for batch in batches(3, size=1):
        model.train_step(batch, wrapper)
    assert finite(model, wrapper)
    assert not same_state(model, make())
    holds('Unusual batches', 'one sample', name, 'trains', count=3)


@pytest.mark.parametrize('name', ['sam', 'asam'])
def test_an_empty_batch(name: str, holds: Holds) -> None:
    """The mean over no samples is nan, its gradient zero: the step is the base optimizer's."""
    ours, theirs = make(norm=False), make(norm=False)
    wrapper, base = build(name, ours), OptimWrapper(momentum_sgd(theirs))
    (empty,), (batch,) = batches(1, size=0), batches(1)
    with logged() as records:
        ours.train_step(empty, wrapper)
    theirs.train_step(empty, base)
    assert same_state(ours, theirs)
    assert 'the loss is nan' in records[0].getMessage()
    assert records[0].getMessage().endswith('Samples: none, the batch is empty')
    ours.train_step(batch, wrapper)
    assert finite(ours, wrapper)
    holds('Unusual batches', 'no sample', name, "the base optimizer's step, event in the log")


@pytest.mark.parametrize('name', ['esam', 'esam-history', 'ausam', 'ausam-loader'])
def test_nothing_to_select_from(name: str, holds: Holds) -> None:
    model = make(norm=False)
    wrapper = build(name, model)
    with pytest.raises(ValueError, match='found no batch among the arguments'):
        model.train_step(batches(1, size=0)[0], wrapper)
    assert same_state(model, make(norm=False))
    model.train_step(batches(1)[0], wrapper)
    assert finite(model, wrapper)
    holds('Unusual batches', 'no sample', name, 'a clear error, nothing changed')


MASKED = [case for case in CASES if case.name in ('HeatmapHead', 'SimCCHead', 'RTMCCHead', 'RLEHead')]


@pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, id=case.name, marks=QUIET if 'Heatmap' in case.name else [*QUIET, pytest.mark.slow])
        for case in MASKED
    ],
)
def test_all_keypoints_masked(case: Any, holds: Holds) -> None:
    """Every keypoint has weight 0: the loss is 0, or the mean over nothing."""
    init_default_scope('mmpose')
    set_epoch(0)
    cfg = case.config()
    start = build_recipe(cfg)
    batch = case.batch(cfg)
    for sample in batch['data_samples']:
        sample.gt_instance_labels.keypoint_weights.zero_()
    for kind in ('SAMOptimWrapper', 'ESAMOptimWrapper', 'AUSAMOptimWrapper'):
        model = copy.deepcopy(start)
        wrapper = build_optim_wrapper(model, {**cfg.optim_wrapper, 'type': kind})
        model.train_step(copy.deepcopy(batch), wrapper)
        assert finite(model, wrapper)
        assert all(np.isfinite(scores(wrapper)))
        holds('Unusual batches', f'all keypoints masked ({case.name})', kind, 'weights finite, history finite')
