"""Per-sample losses of MMPose's shipped configs, and the table of them in the documentation.

``python -m tests.per_sample_loss.test_per_sample_loss_heads`` writes the table anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpose.registry import MODELS
from torch import Tensor, nn

from mm_sharp.per_sample_loss import LossRecord, PerSampleLoss, PerSampleLossError, Reduction
from mm_sharp.per_sample_loss.evaluate import Evaluator
from mm_sharp.per_sample_loss.find import is_neither
from tests import mmpose_cases
from tests.mmpose_cases import CASES, QUIET, Case, build, set_epoch
from tests.toys import same_bits

TABLE = Path(__file__).parents[2] / 'docs' / 'per_sample_losses.md'
REFUSED = ('CIDHead', 'YOLOXPoseHead', 'RTMOHead')
SUPPORTED = [case for case in CASES if case.name not in REFUSED]
# RLE's flow multiplies matrices, which 16 bits round differently for one sample than for all.
BFLOAT16 = {'RLEHead': 1e-3}
N = 3  # not 2: SimCC has two tensors in a list, which are no samples

pytestmark = QUIET


@pytest.fixture(autouse=True)
def _as_in_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a Runner sets up and some models read: the default scope, and the epoch in the message hub."""
    init_default_scope('mmpose')
    set_epoch(0)
    monkeypatch.setattr(mmpose_cases, 'BATCH', N)
    yield
    set_epoch(0)


def prepared(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's model in training mode, and a batch as the model's forward gets it."""
    cfg: Config = case.config()
    torch.manual_seed(0)
    model = build(cfg)
    return model, model.data_preprocessor(case.batch(cfg), training=True)


def forward(model: Any, data: dict[str, Any]) -> Tensor:
    # MMPose's lifters add dimensions to the labels in place; every forward gets labels of its own.
    total: Tensor = model.parse_losses(model(**copy.deepcopy(data), mode='loss'))[0]
    return total


def recorded(per_sample: PerSampleLoss, data: dict[str, Any], **how: Any) -> tuple[LossRecord, Tensor]:
    with per_sample.record(**how) as record:
        total = forward(per_sample.model, data)
    return record, total


def one_by_one(model: nn.Module, data: dict[str, Any]) -> Tensor:
    """The whole model on every sample alone; BatchNorm must be in evaluation mode."""
    with torch.no_grad():
        return torch.stack([forward(model, {key: value[i : i + 1] for key, value in data.items()}) for i in range(N)])


def check_identity(record: LossRecord, total: Tensor, tolerance: float) -> None:
    """The losses' sum or mean is the total: for the whole model, or loss by loss where it mixes both."""
    losses = record.losses(total)
    assert losses.shape == (N,)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    parts = [term.reduction.combine(term.values) for term in record.terms]
    made = torch.stack(parts).sum() if record.reduction is None else record.reduction.combine(losses)
    torch.testing.assert_close(made, total.detach().float(), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses, torch.stack([term.values for term in record.terms]).sum(0))


SLOW = ('CPMHead', 'DWPoseDistiller', 'MSPNHead', 'RTMWHead')


@pytest.mark.parametrize(
    'case',
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ()) for case in SUPPORTED],
)
def test_the_samples_losses_make_the_batchs(case: Case) -> None:
    model, data = prepared(case)
    per_sample = PerSampleLoss(model)
    record, total = recorded(per_sample, data)
    check_identity(record, total, 1e-5)
    row = head_row(case, per_sample, record)
    assert row in documented(), 'for a new table, run: python -m tests.per_sample_loss.test_per_sample_loss_heads'

    with torch.autocast('cpu', torch.bfloat16):
        check_identity(*recorded(PerSampleLoss(model), data), BFLOAT16.get(case.name, 1e-5))

    # Each sample's loss is what the whole model gives for this sample alone, and recording changes no bit.
    model.eval()
    record, total = recorded(per_sample, data)
    with torch.no_grad():
        assert same_bits(total, forward(model, data))
    torch.testing.assert_close(record.losses(total), one_by_one(model, data), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('case', [case for case in CASES if case.name in REFUSED], ids=lambda case: case.name)
def test_heads_whose_rows_are_not_samples(case: Case) -> None:
    model = build(case.config())
    with pytest.raises(PerSampleLossError, match=f'{case.name}: the rows of its losses are anchors or people') as error:
        PerSampleLoss(model)
    assert refused_row(case) in documented()
    assert "optim_wrapper = dict(type='SAMOptimWrapper'" in str(error.value)


NAMES = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    'name', ['RTMCCHead', 'VisPredictHead', 'RLEHead', 'AssociativeEmbeddingHead', 'DSNTHead', 'TemporalRegressionHead']
)
def test_weights_and_their_gradients(name: str) -> None:
    """With dropout and BatchNorm in evaluation mode, the weighted batch is the weighted sum of batches of one."""
    model, data = prepared(NAMES[name])
    model.eval()
    weights, full = torch.tensor([0.1, 0.5, 0.9]), 7
    parameters = [p for p in model.parameters() if p.requires_grad]
    record, total = recorded(PerSampleLoss(model), data, weights=weights, full_size=full)
    record.losses(total)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)

    kinds = {term.reduction for term in record.terms}
    expected: Tensor = torch.zeros(())
    for i in range(N):
        single = {key: value[i : i + 1] for key, value in data.items()}
        losses = model(**copy.deepcopy(single), mode='loss')
        for key, value in losses.items():
            if 'loss' in key:
                is_sum = kinds == {Reduction.SUM} or key in ('loss_pull', 'loss_push')
                expected = expected + weights[i] * (full if is_sum else 1) * value
    torch.testing.assert_close(total, expected, rtol=2e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-6


def test_a_summed_loss_on_a_subset_is_as_large_as_on_the_batch() -> None:
    model, data = prepared(NAMES['SimCCHead'])
    model.eval()
    subset = {key: value[:2] for key, value in data.items()}
    record, total = recorded(PerSampleLoss(model), subset, full_size=N)
    assert record.reduction is Reduction.SUM
    torch.testing.assert_close(total, record.subset_factor(2, N) * forward(model, subset))


@pytest.mark.parametrize('name', ['DSNTHead', 'DWPoseDistiller'])
def test_losses_that_depend_on_the_epoch(name: str) -> None:
    """DSNT drops its second loss from an epoch on; DWPose fades its distillation losses out."""
    model, data = prepared(NAMES[name])
    model.eval()
    per_sample = PerSampleLoss(model)
    if name == 'DSNTHead':
        model.head.lambda_t = 3
    seen = []
    for epoch in (0, 5):
        set_epoch(epoch)
        record, total = recorded(per_sample, data)
        check_identity(record, total, 1e-5)
        torch.testing.assert_close(record.losses(total), one_by_one(model, data), rtol=2e-5, atol=1e-6)
        seen.append(total.item())
    assert seen[0] != seen[1]


def _heatmaps(n: int = N) -> list[Tensor]:
    return [torch.rand(n, 4, 6, 5), torch.rand(n, 4, 6, 5).square(), torch.rand(n, 4)]


def _simcc() -> list[Any]:
    return [
        (torch.randn(N, 4, 12), torch.randn(N, 4, 16)),
        (torch.rand(N, 4, 12), torch.rand(N, 4, 16)),
        torch.rand(N, 4),
    ]


POSES = [torch.randn(N, 4, 2), torch.randn(N, 4, 2)]
WEIGHTED_POSES = [*POSES, torch.rand(N, 4, 1)]
SCORES = [torch.randn(N, 4), torch.rand(N, 4)]
LABELS = torch.tensor([2, 0, 3])
FORMS: list[tuple[Any, list[Any]]] = [
    (dict(type='KLDiscretLoss', beta=10.0, label_softmax=True), _simcc()),
    (dict(type='KLDiscretLoss', use_target_weight=False), _simcc()),
    (dict(type='KLDiscretLoss', use_target_weight=False), [*_simcc()[:2], None]),
    (dict(type='KLDiscretLoss', mask=[1, 2], mask_weight=0.3), _simcc()),
    (dict(type='KeypointMSELoss', loss_weight=3.0), _heatmaps()[:2]),
    (dict(type='KeypointMSELoss', use_target_weight=True), _heatmaps()),
    (dict(type='RLELoss', use_target_weight=True), [*POSES, POSES[0] + 0.1, torch.rand(N, 4, 2)]),
    (dict(type='RLELoss', q_distribution='gaussian', size_average=False), [*POSES, POSES[0] + 0.1]),
    (dict(type='RLELoss', residual=False), [*POSES, POSES[0] + 0.1]),
    (dict(type='L1Loss', reduction='sum', loss_weight=2.0), POSES),
    (dict(type='L1Loss', use_target_weight=True, loss_weight=0.3), WEIGHTED_POSES),
    (dict(type='MSELoss', use_target_weight=True), WEIGHTED_POSES),
    (dict(type='SmoothL1Loss', use_target_weight=True), WEIGHTED_POSES),
    (dict(type='BCELoss', use_target_weight=True, loss_weight=0.3), [*SCORES, torch.rand(N)]),
    (dict(type='BCELoss', reduction='sum'), SCORES),
    (nn.MSELoss(), POSES),
    (nn.MSELoss(reduction='sum'), [torch.randn(N), torch.randn(N)]),
    (nn.L1Loss(), [pose.transpose(1, 2) for pose in POSES]),
    (nn.SmoothL1Loss(beta=0.3), POSES),
    (nn.HuberLoss(), POSES),
    (nn.BCELoss(weight=torch.rand(4)), [SCORES[0].sigmoid(), SCORES[1]]),
    (nn.BCEWithLogitsLoss(pos_weight=torch.rand(4)), SCORES),
    (nn.KLDivLoss(reduction='batchmean'), [SCORES[0].log_softmax(1), SCORES[1]]),
    (nn.CrossEntropyLoss(), [SCORES[0], LABELS]),
    (nn.CrossEntropyLoss(reduction='sum', ignore_index=2, weight=torch.rand(4)), [SCORES[0], LABELS]),
]
NO_FORMS: list[tuple[Any, list[Any]]] = [
    (dict(type='KeypointMSELoss'), [*_heatmaps()[:2], None, torch.rand(N, 1, 6, 5)]),
    (dict(type='KeypointMSELoss'), [*_heatmaps()[:2], torch.rand(N, 4, 6, 5), torch.rand(N, 4, 6, 5)]),
    (dict(type='KeypointMSELoss', skip_empty_channel=True), [torch.rand(N, 4, 6, 5), torch.zeros(N, 4, 6, 5)]),
    (dict(type='KeypointMSELoss'), SCORES),
    (nn.CrossEntropyLoss(label_smoothing=0.1), [SCORES[0], LABELS]),
    (nn.CrossEntropyLoss(), SCORES),
    (nn.CrossEntropyLoss(), [torch.randn(N, 4, 2), torch.randint(4, (N, 2))]),
]


def evaluated(module: nn.Module, args: list[Any], how: str) -> list[Tensor]:
    """The losses by the form, by vmap or in the loop."""
    evaluator = Evaluator(module)
    assert evaluator.form is not None
    evaluator.form = evaluator.form if how == 'form' else None
    evaluator.is_looped = how == 'loop'
    ((losses, _),) = evaluator(module, N, args, {}, [module(*args)], 1e-5)
    assert (evaluator.form is not None, evaluator.is_looped) == (how == 'form', how == 'loop')
    return losses


@pytest.mark.parametrize(('loss', 'args'), [*FORMS, *NO_FORMS])
def test_forms_equal_batches_of_one(loss: Any, args: list[Any]) -> None:
    module = loss if isinstance(loss, nn.Module) else MODELS.build(loss)
    with torch.no_grad():
        torch.testing.assert_close(
            evaluated(module, args, 'form'), evaluated(module, args, 'loop'), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize('loss', [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.CrossEntropyLoss()])
def test_forms_do_what_vmap_does(loss: nn.Module) -> None:
    """Bit by bit, gradients included."""
    args = [SCORES[0].clone().requires_grad_(), LABELS if isinstance(loss, nn.CrossEntropyLoss) else SCORES[1]]
    form, vmap = (evaluated(loss, args, how) for how in ('form', 'vmap'))
    assert same_bits(form, vmap)
    weights = torch.rand(N)
    gradients = [torch.autograd.grad((weights * losses).sum(), args[0])[0] for losses in (form, vmap)]
    assert same_bits(*gradients)


def test_a_form_that_is_wrong_is_left() -> None:
    """As for a version of MMPose whose loss computes something else under the same name."""
    module = MODELS.build(dict(type='KeypointMSELoss'))
    module.forward = lambda output, target: 2 * type(module).forward(module, output, target)
    evaluator = Evaluator(module)
    args = _heatmaps()[:2]
    ((losses, _),) = evaluator(module, N, args, {}, [module(*args)], 1e-5)
    assert evaluator.form is None
    torch.testing.assert_close(losses, torch.stack([module(args[0][i : i + 1], args[1][i : i + 1]) for i in range(N)]))


def test_broadcast_rows_are_no_samples() -> None:
    """Row i of (N, 1) - (N,) is made of all samples' targets, and their mean is the loss all the same."""
    output, target, module = torch.randn(N, 1), torch.randn(N), nn.MSELoss()
    with pytest.warns(UserWarning, match='target size'):
        ((losses, _),) = Evaluator(module)(module, N, (output, target), {}, [module(output, target)], 1e-5)
    torch.testing.assert_close(losses, (output[:, 0] - target).square())


PER_LOSS = [
    # Those that vmap refuses, and options that change what a loss is of its samples.
    ('VariFocalLoss', {}, [torch.randn(N, 4), torch.rand(N, 4)], Reduction.MEAN),
    ('SoftWeightSmoothL1Loss', {'use_target_weight': True}, [*POSES, torch.rand(N, 4, 2)], Reduction.MEAN),
    ('JSDiscretLoss', {}, [torch.rand(N, 4, 9), torch.rand(N, 4, 9), torch.rand(N, 4)], Reduction.MEAN),
    (
        'JSDiscretLoss',
        {'size_average': False},
        [torch.rand(N, 4, 9), torch.rand(N, 4, 9), torch.rand(N, 4)],
        Reduction.SUM,
    ),
    ('L1Loss', {'reduction': 'sum'}, POSES, Reduction.SUM),
    (
        'OKSLoss',
        {'metainfo': 'configs/_base_/datasets/coco.py'},
        [torch.rand(N, 17, 2), torch.rand(N, 17, 2)],
        Reduction.MEAN,
    ),
    ('WingLoss', {}, POSES, Reduction.MEAN),
    ('AdaptiveWingLoss', {'use_target_weight': True}, _heatmaps(), Reduction.MEAN),
    ('KeypointOHKMMSELoss', {'topk': 2}, _heatmaps(), Reduction.MEAN),
    ('BoneLoss', {'joint_parents': [0, 0, 1, 2]}, [torch.randn(N, 4, 3), torch.randn(N, 4, 3)], None),
    ('FocalHeatmapLoss', {}, [torch.rand(N, 4, 6, 5), torch.ones(N, 4, 6, 5)], None),
    (
        'SoftWeightSmoothL1Loss',
        {'use_target_weight': True, 'supervise_empty': False},
        [*POSES, torch.ones(N, 4, 2)],
        None,
    ),
    (
        'MultipleLossWrapper',
        {'losses': [dict(type='MSELoss'), dict(type='L1Loss')]},
        [POSES, POSES[::-1]],
        Reduction.MEAN,
    ),
]


class OneLoss(nn.Module):
    """A model that is nothing but a loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss_module = loss

    def forward(self, args: list[Any], data_samples: list[Any]) -> Any:
        output = self.loss_module(*args)
        return sum(output) if isinstance(output, list) else output


@pytest.mark.parametrize(('kind', 'options', 'args', 'reduction'), PER_LOSS)
def test_mmposes_other_losses(kind: str, options: dict[str, Any], args: list[Any], reduction: Reduction | None) -> None:
    torch.manual_seed(0)
    model = OneLoss(MODELS.build(dict(type=kind, **options)))
    if reduction is None:
        # With equal counts in all samples such a loss looks like a mean; the class is known not to be one.
        assert is_neither(model.loss_module)
        with pytest.raises(PerSampleLossError, match=f'OneLoss.*{kind}.*neither the sum nor the mean'):
            recorded_loss(model, args)
        return
    record, total = recorded_loss(model, args)
    single = [model(_row(args, i), data_samples=[None]) for i in range(N)]
    torch.testing.assert_close(record.losses(total), torch.stack(single))
    assert record.reduction is reduction
    torch.testing.assert_close(reduction.combine(record.losses(total)), total, rtol=1e-5, atol=0)


def recorded_loss(model: OneLoss, args: list[Any]) -> tuple[LossRecord, Tensor]:
    with PerSampleLoss(model).record() as record:
        total = model(args, data_samples=[None] * N)
    return record, total


def _row(value: Any, i: int) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) else type(value)(_row(item, i) for item in value)


def head_row(case: Case, per_sample: PerSampleLoss, record: LossRecord) -> str:
    """A head's line in the documentation, made of what was recorded."""
    kinds = sorted({term.name.rsplit('(', 1)[1].rstrip(')') for term in record.terms})
    reduction = 'mixed: ' + ', '.join(t.reduction.value for t in record.terms)
    if record.reduction is not None:
        reduction = f'the {record.reduction.value}'
    how = 'a loop' if per_sample.looped or 'AssociativeEmbeddingLoss' in kinds else 'one call'
    return f'| {case.name} (`{config_name(case)}`) | {", ".join(kinds)} | {reduction} | {how} |'


def refused_row(case: Case) -> str:
    return f'| {case.name} (`{config_name(case)}`) | | refused: rows are anchors or people | |'


def config_name(case: Case) -> str:
    return case.path.rsplit('/', 1)[1].removesuffix('.py')


def documented() -> list[str]:
    return TABLE.read_text(encoding='utf-8').split('<!-- table -->\n')[1].splitlines()[2:]


def test_the_table_has_one_line_for_each_config() -> None:
    assert [line.split(' ')[1] for line in documented()] == [case.name for case in CASES]


def test_at_least_16_heads_are_supported() -> None:
    assert len({case.name.split('-')[0] for case in SUPPORTED}) >= 16


def main() -> None:
    """Write the documentation's table."""
    init_default_scope('mmpose')
    set_epoch(0)
    mmpose_cases.BATCH = N
    rows = ['| head (config) | losses | the total is | evaluated |', '|---|---|---|---|']
    for case in CASES:
        if case.name in REFUSED:
            rows.append(refused_row(case))
            continue
        model, data = prepared(case)
        per_sample = PerSampleLoss(model)
        rows.append(head_row(case, per_sample, recorded(per_sample, data)[0]))
    before, _, after = TABLE.read_text(encoding='utf-8').split('<!-- table -->\n')
    text = '\n'.join(rows)
    TABLE.write_text(f'{before}<!-- table -->\n{text}\n<!-- table -->\n{after}', encoding='utf-8')


if __name__ == '__main__':
    main()
