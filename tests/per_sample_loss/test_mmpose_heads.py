"""Our one line in MMPose's shipped configs, one for each head type."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mm_sharp.compat import MissingOperatorError
from mm_sharp.per_sample_loss import PerSampleLossError, Reduction
from tests import mmpose_cases
from tests.mmpose_cases import CASES, NEED_OPERATORS, QUIET, Case, build, set_epoch
from tests.toys import same_bits, same_state

pytestmark = QUIET
# Losses that are sums over the batch, as far as one batch shows.
SUMS = {
    **{name: {'loss_kpt'} for name in ('SimCCHead', 'RTMCCHead', 'RTMWHead', 'DWPoseDistiller')},
    'AssociativeEmbeddingHead': {'loss_pull'},
}
REFUSED = ('CIDHead', 'YOLOXPoseHead', 'RTMOHead')


@pytest.fixture(autouse=True)
def _as_in_training() -> None:
    """What a Runner sets up and some models read: the default scope, and the epoch in the message hub."""
    init_default_scope('mmpose')
    set_epoch(0)


# Those of the recipes in configs/sam/; the others with what is slow.
FAST = ('HeatmapHead', 'SimCCHead', 'RTMCCHead', 'RLEHead')


@pytest.fixture(
    scope='module',
    params=[pytest.param(c, id=c.name, marks=() if c.name in FAST else pytest.mark.slow) for c in CASES],
)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope='module')
def start(case: Case) -> nn.Module:
    """The recipe's model at its initial weights; for both tests of a case, since the larger ones take seconds."""
    init_default_scope('mmpose')
    set_epoch(0)
    torch.manual_seed(0)
    return build(case.config())


def train_step(model: nn.Module, cfg: Config, batch: dict[str, Any], **changes: Any) -> Any:
    """One training step with the recipe's optimizer; ``changes`` go into its ``optim_wrapper``."""
    wrapper = build_optim_wrapper(model, {**cfg.optim_wrapper, **changes})
    torch.manual_seed(1)
    model.train_step(copy.deepcopy(batch), wrapper)
    return wrapper


def test_our_line_trains_the_recipe(case: Case, start: nn.Module) -> None:
    cfg = case.config()
    batch = case.batch(cfg)
    base, zero, sam = (copy.deepcopy(start) for _ in range(3))
    train_step(base, cfg, batch, type='OptimWrapper')
    train_step(zero, cfg, batch, type='SAMOptimWrapper', rho=0.0)
    wrapper = train_step(sam, cfg, batch, type='SAMOptimWrapper', rho=0.05)

    # rho = 0: nothing that the model does in a forward pass makes the second one differ from the first.
    assert same_state(zero, base)

    changed = [not torch.equal(old, new) for old, new in zip(start.parameters(), sam.parameters(), strict=True)]
    assert any(changed)
    assert all(bool(value.isfinite().all()) for value in sam.state_dict().values())
    # The second pass leaves running statistics and counters alone.
    assert all(same_bits(old, new) for old, new in zip(base.buffers(), sam.buffers(), strict=True))
    assert not same_state(sam, base)
    assert wrapper.last_step.loss != wrapper.last_step.perturbed_loss


def test_the_samples_are_chosen_in_the_recipe(case: Case, start: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESAM runs its second pass on 2 of 3 samples, AUSAM both; heads without losses of samples are refused."""
    monkeypatch.setattr(mmpose_cases, 'BATCH', 3)
    cfg = case.config()
    batch = case.batch(cfg)
    for number, sample in enumerate(batch['data_samples']):
        sample.set_metainfo({'id': number, 'dataset_name': 'drawn'})
    for changes in (dict(type='ESAMOptimWrapper', gamma=0.5), dict(type='AUSAMOptimWrapper', reweight=True)):
        model = copy.deepcopy(start)
        sizes: list[int] = []
        model.register_forward_hook(
            lambda _, args, kwargs, output, sizes=sizes: sizes.append(len(kwargs['data_samples'])), with_kwargs=True
        )
        if case.name in REFUSED:
            with pytest.raises(PerSampleLossError, match='rows of its losses are anchors or people'):
                train_step(model, cfg, batch, **changes)
            assert same_state(model, start)
            continue
        wrapper = train_step(model, cfg, batch, **changes)
        assert sizes == ([3, 3, 2] if changes['type'] == 'ESAMOptimWrapper' else [2, 2])
        assert not same_state(model, start)
        assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
        assert wrapper.last_step.metrics()['mean_difference'] != 0.0
        assert all(
            old.requires_grad == new.requires_grad
            for old, new in zip(start.parameters(), model.parameters(), strict=True)
        )


def test_a_uniform_draw_works_with_every_head(case: Case, start: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with those that have no losses of samples. What it finds to be sums are those that are known to be."""
    monkeypatch.setattr(mmpose_cases, 'BATCH', 4)
    cfg = case.config()
    model = copy.deepcopy(start)
    wrapper = train_step(model, cfg, case.batch(cfg), type='AUSAMOptimWrapper', draw='uniform')
    assert len(wrapper._draw.chosen) == 2
    assert not same_state(model, start)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    found = {name for name, kind in wrapper._scale.reductions.items() if kind is Reduction.SUM}
    assert found == SUMS.get(case.name, set())


AMP_CASES = [case for case in CASES if case.name in FAST]


def test_all_heads_of_our_recipes_are_tried_in_mixed_precision() -> None:
    assert {case.name for case in AMP_CASES} == set(FAST)


@pytest.mark.parametrize('dtype', [pytest.param('float16', marks=pytest.mark.slow), 'bfloat16'])
@pytest.mark.parametrize('head', AMP_CASES, ids=lambda case: case.name)
def test_our_line_trains_the_recipe_in_mixed_precision(head: Case, dtype: str) -> None:
    cfg = head.config()
    model = build(cfg)
    start = copy.deepcopy(model)
    wrapper = train_step(model, cfg, head.batch(cfg), type='SAMOptimWrapper', rho=0.05, dtype=dtype, loss_scale=8.0)
    assert not same_state(model, start)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert wrapper.last_step.loss.isfinite()
    assert wrapper.last_step.loss != wrapper.last_step.perturbed_loss


@pytest.mark.parametrize('recipe', NEED_OPERATORS, ids=lambda case: case.name)
def test_a_missing_operator_is_named(recipe: Case) -> None:
    """These models call a compiled operator of the full MMCV; there, they belong to the cases above."""
    cfg = recipe.config()
    model, batch = build(cfg), recipe.batch(cfg)
    before = copy.deepcopy(model)
    with pytest.raises(MissingOperatorError, match='deform_conv'):
        train_step(model, cfg, batch, type='SAMOptimWrapper', rho=0.05)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
