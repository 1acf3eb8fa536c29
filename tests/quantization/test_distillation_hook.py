"""DistillationHook: the mixture's gradients, whole steps of every kind of method, the teacher's place, refusals."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from mmpose.models.losses import KeypointMSELoss, KLDiscretLoss
from torch import Tensor, nn

from mm_sharp.ops import rare_changes
from mm_sharp.ops.rng import RandomState
from mm_sharp.quantization import DistillationHook, QuantizationPolicy, calibrate, quantize
from mm_sharp.quantization.distillation_hook import mixture
from tests import mmpose_cases
from tests.conftest import ROOT
from tests.mmpose_cases import QUIET, Case, build
from tests.quantized_toys import POLICIES, SIMCC
from tests.tiny_data import write_float_and_w4a4
from tests.tool_runs import Tools
from tests.toys import same_bits

pytestmark = QUIET
HEATMAP = ROOT / 'configs' / 'study' / 'td-hm_res18-quarter_demo-64x48.py'
WRAPPERS: dict[str, dict[str, Any]] = {
    'SAM': dict(type='SAMOptimWrapper', rho=0.05),
    'ESAM': dict(type='ESAMOptimWrapper', rho=0.05),
    'AUSAM': dict(type='AUSAMOptimWrapper', rho=0.05, schedule='constant'),
}
SHARE = 0.3
STUDENT = """
_base_ = '{student}.py'
custom_imports = dict(imports=['mm_sharp.quantization'])
train_cfg = dict(max_epochs=2, val_interval=2)
load_from = '{folder}/float.pth'
default_hooks = dict(distillation=dict(type='DistillationHook'), checkpoint=dict(save_best=None, max_keep_ckpts=-1))
"""


# ------------------------------------------------------------------ the mixture
def mean_squared(output: Any, target: Any, weights: Tensor) -> Tensor:
    """Of each sample, (N,)."""
    return ((output - target).square() * weights[..., None, None]).mean((1, 2, 3))


def divergence(beta: float) -> Any:
    def of_samples(outputs: Any, targets: Any, weights: Tensor) -> Tensor:
        """Of each sample, (N,), to targets that are distributions."""
        total = torch.zeros(len(weights))
        for output, target in zip(outputs, targets, strict=True):
            logarithm = (output * beta).log_softmax(-1)
            total = total + ((target.xlogy(target) - target * logarithm).mean(-1) * weights).sum(1)
        return total / weights.shape[1]

    return of_samples


@pytest.mark.parametrize('kind', ['heatmaps', 'SimCC', 'SimCC, labels through softmax'])
def test_the_mixture_is_the_weighted_sum_of_both_losses(kind: str) -> None:
    """By hand: the gradient, and every sample's loss at one output less that at another."""
    torch.manual_seed(0)
    weights = torch.rand(3, 5)
    make = (lambda: torch.rand(3, 5, 6, 4)) if kind == 'heatmaps' else (lambda: [torch.rand(3, 5, n) for n in (6, 8)])
    labels, teacher, first, second = (make() for _ in range(4))
    loss: nn.Module = KeypointMSELoss(use_target_weight=True)
    reference, to_labels, to_teacher, reduce = mean_squared, labels, teacher, torch.mean
    if kind != 'heatmaps':
        softmax = 'softmax' in kind
        loss = KLDiscretLoss(beta=3.0, label_softmax=softmax, label_beta=7.0)
        reference, reduce = divergence(3.0), torch.sum
        to_labels = [(part * 7.0).softmax(-1) for part in labels] if softmax else labels
        to_teacher = [(part * 3.0).softmax(-1) for part in teacher]

    def by_hand(output: Any) -> Tensor:
        return (1 - SHARE) * reference(output, to_labels, weights) + SHARE * reference(output, to_teacher, weights)

    mixed = mixture(loss, labels, teacher, SHARE)

    def of_sample(output: Any, number: int) -> Tensor:
        rows = slice(number, number + 1)
        cut = [
            [part[rows] for part in value] if isinstance(value, (list, tuple)) else value[rows]
            for value in (output, mixed)
        ]
        return loss(*cut, weights[rows])

    leaves = [first] if kind == 'heatmaps' else first
    for leaf in leaves:
        leaf.requires_grad_(True)
    found = torch.autograd.grad(loss(first, mixed, weights), leaves)
    expected = torch.autograd.grad(reduce(by_hand(first)), leaves)
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-7)
    differences = torch.stack([of_sample(second, i) - of_sample(first, i) for i in range(3)])
    assert torch.allclose(differences, by_hand(second) - by_hand(first), rtol=1e-3, atol=1e-6)


def test_another_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r'the teacher gives \[\(1, 2, 3, 4\)\] where the labels are \[\(1, 2, 3, 5\)\]'
    ):
        mixture(KeypointMSELoss(), torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4), 0.5)


# ------------------------------------------------------------------ whole steps
@pytest.fixture(scope='module', params=['heatmaps', 'SimCC'])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student, quantized from a teacher whose checkpoint is saved, its batch, and a runner's part of both."""
    init_default_scope('mmpose')
    path = str(tmp_path_factory.mktemp('teacher') / 'float.pth')
    case = Case('SimCC', str(SIMCC), (96, 128), stride=None)
    if request.param == 'heatmaps':
        case = Case('HeatmapHead', str(HEATMAP), edit=lambda cfg: cfg.model.head.update(deconv_out_channels=(8, 8)))
    cfg = case.config()
    torch.manual_seed(0)
    with patch.object(mmpose_cases, 'BATCH', 4):
        teacher, batch = build(cfg), case.batch(cfg)
    for number, sample in enumerate(batch['data_samples']):
        sample.set_metainfo({'id': number, 'dataset_name': 'drawn'})
    torch.save({'state_dict': teacher.state_dict()}, path)
    student = quantize(copy.deepcopy(teacher), QuantizationPolicy.from_config(POLICIES['W4A4']))
    calibrate(student, [batch])
    arguments = dict(cfg.model)
    kind = arguments.pop('type')
    model = dict(type='QuantizedModel', model=kind, policy=POLICIES['W4A4'], **arguments)
    return SimpleNamespace(
        student=student, teacher=teacher.eval(), batch=batch, cfg=ConfigDict(model=model, load_from=path)
    )


def step(model: Any, batch: Any, wrapper: dict[str, Any]) -> None:
    optim_wrapper = build_optim_wrapper(model, {**wrapper, 'optimizer': dict(type='SGD', lr=0.1, momentum=0.9)})
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.train_step(copy.deepcopy(batch), optim_wrapper)


@torch.no_grad()
def with_mixed_labels(start: Any) -> Any:
    """The batch whose labels are the mixture, made by hand."""
    mixed = copy.deepcopy(start.batch)
    inputs = start.teacher.data_preprocessor(copy.deepcopy(mixed), True)['inputs']
    outputs = start.teacher(inputs, None, mode='tensor')
    for number, sample in enumerate(mixed['data_samples']):
        if isinstance(outputs, Tensor):
            sample.gt_fields.heatmaps = sample.gt_fields.heatmaps.lerp(outputs[number], SHARE)
            continue
        labels = sample.gt_instance_labels
        for name, output in zip(('keypoint_x_labels', 'keypoint_y_labels'), outputs, strict=True):
            setattr(labels, name, getattr(labels, name).lerp(output[number : number + 1].softmax(-1), SHARE))
    return mixed


@pytest.mark.slow
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_steps_are_those_on_mixed_labels(start: Any, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a step does, the choice of samples included; the teacher sees each batch as it is cut down, once."""
    init_default_scope('mmpose')
    expected, student = copy.deepcopy(start.student), copy.deepcopy(start.student)
    step(expected, with_mixed_labels(start), WRAPPERS[wrapper])

    hook, rows = DistillationHook(weight=SHARE), []
    before = RandomState.capture()
    hook.before_train(SimpleNamespace(model=student, cfg=start.cfg))
    assert torch.equal(before.cpu, RandomState.capture().cpu)
    forward = type(student).forward

    def counted(model: Any, inputs: Tensor, *args: Any, mode: str, **kwargs: Any) -> Any:
        if mode == 'tensor':
            assert not model.training
            assert not torch.is_grad_enabled()
            rows.append(len(inputs))
        return forward(model, inputs, *args, mode=mode, **kwargs)

    monkeypatch.setattr(type(student), 'forward', counted)
    monkeypatch.setattr(rare_changes, '_ALL_UP_TO', 0)
    step(student, start.batch, WRAPPERS[wrapper])
    for (name, found), value in zip(student.state_dict().items(), expected.state_dict().values(), strict=True):
        # A teacher on half of the batch rounds differently.
        assert torch.equal(found, value) if wrapper == 'SAM' else torch.allclose(found, value, atol=1e-5), name
    # Both passes of the first step have copies of the inputs, by which others might be told apart.
    assert rows == {'SAM': [4, 4, 4], 'ESAM': [4, 4, 2, 4, 2], 'AUSAM': [3, 3, 3]}[wrapper]
    assert student.state_dict().keys() == start.student.state_dict().keys()
    hook.after_train(None)
    plain = copy.deepcopy(start.student)
    assert not student.backbone._forward_pre_hooks
    assert len(student.head.loss_module._forward_pre_hooks) == len(plain.head.loss_module._forward_pre_hooks)


# ------------------------------------------------------------------ whole runs
@pytest.mark.slow
@pytest.mark.parametrize('student', ['float', 'w4a4'])
def test_resumed_equals_never_stopped(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher of a resumed run is the one that it began with, and not its own checkpoint."""
    write_float_and_w4a4(tmp_path, SIMCC, 4)
    plain = Config.fromfile(tmp_path / 'float.py')
    with DefaultScope.overwrite_default_scope('mmpose'):
        torch.save({'state_dict': build(plain).state_dict()}, tmp_path / 'float.pth')
    (tmp_path / 'student.py').write_text(STUDENT.format(student=student, folder=tmp_path))
    within = Tools(tmp_path, monkeypatch)
    start, name = ('train', 'student.py', '--no-validate'), f'visualizer.name={student}'
    within(*start, '--work-dir', 'straight', '--cfg-options', f'{name}-straight')
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'straight' / 'epoch_1.pth', tmp_path / 'resumed')
    within(*start, '--work-dir', 'resumed', '--resume', '--cfg-options', f'{name}-resumed')
    straight, resumed = (
        torch.load(tmp_path / folder / 'epoch_2.pth', weights_only=True)['state_dict']
        for folder in ('straight', 'resumed')
    )
    assert straight.keys() == resumed.keys()
    assert all(same_bits(straight[name], resumed[name]) for name in straight)
    (log,) = (tmp_path / 'resumed').glob('*/*.log')
    assert f'Distillation from {tmp_path}/float.pth' in log.read_text()


# ------------------------------------------------------------------ refusals
@pytest.mark.slow
def test_what_cannot_be_distilled_is_refused(start: Any, tmp_path: Path) -> None:
    init_default_scope('mmpose')
    runner = SimpleNamespace(model=copy.deepcopy(start.student), cfg=start.cfg)
    other = str(tmp_path / 'other.pth')
    torch.save({'state_dict': start.student.state_dict()}, other)
    with pytest.raises(ValueError, match=r"teacher='.*other\.pth' is not of the run's model in float"):
        DistillationHook(teacher=other).before_train(runner)
    with pytest.raises(ValueError, match=r'teacher=None is not allowed in a run without load_from'):
        DistillationHook().before_train(SimpleNamespace(model=runner.model, cfg=ConfigDict(model={})))
    resumed = ConfigDict(model=start.cfg.model, load_from=start.cfg.load_from, resume=True)
    with pytest.raises(ValueError, match=r"a run that is resumed, whose .*write .*teacher='float\.pth'"):
        DistillationHook().before_train(SimpleNamespace(model=runner.model, cfg=resumed))
    runner.model.head.loss_module = nn.SmoothL1Loss()
    with pytest.raises(ValueError, match=r'KeypointMSELoss .* and of KLDiscretLoss, and this one has SmoothL1Loss'):
        DistillationHook().before_train(runner)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(weight=0), r'DistillationHook: weight=0 is not allowed.*\(0, 1\]'),
        (dict(weight=1.5), r'DistillationHook: weight=1\.5 is not allowed'),
        (dict(teacher=3), r"DistillationHook: teacher=3 is not allowed.*teacher='float\.pth'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationHook(**arguments)
