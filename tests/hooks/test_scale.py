"""How far, and where, the weights are perturbed: measured, logged, said once, and warned of once."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp import SAMOptimWrapper
from mm_sharp.errors import RECOMMENDED
from mm_sharp.hooks import scale_report
from mm_sharp.hooks.scale import scale_of, top_level
from mm_sharp.hooks.scale_report import ScaleReport
from mm_sharp.ops.perturbation import RELATIVE
from mm_sharp.step.timing import PerturbationSizes, StepRecord
from tests.references import gradients_of, perturbation_of
from tests.toys import Batch, ToyNet, batches, make, same_state, toy_config
from tests.wrappers import WRAPPERS, build, momentum_sgd


def loss_of(model: ToyNet, batch: Batch) -> Tensor:
    loss: Tensor = model.parse_losses(model(**batch))[0]
    return loss


# ---------------------------------------------------------------- what a step measures
@pytest.mark.parametrize('adaptive', [False, True, 'tensor', 'layer', 'global'])
@pytest.mark.parametrize('perturb', ['all', 'weights'])
def test_the_sizes_are_those_of_e_and_w(adaptive: bool | str, perturb: str) -> None:
    model, reference = make(), make()
    (batch,) = batches(1)
    chosen = [p for n, p in reference.named_parameters() if perturb == 'all' or n in ('conv.weight', 'head.weight')]
    gradients = gradients_of(loss_of(reference, batch), chosen)
    moves = perturbation_of([p.detach() for p in chosen], gradients, 0.1, adaptive)
    wrapper = SAMOptimWrapper(momentum_sgd(model), rho=0.1, adaptive=adaptive, perturb=perturb)
    wrapper.record_sizes = True
    model.train_step(batch, wrapper)
    sizes = wrapper.last_step.sizes
    assert sizes is not None
    assert len(sizes.parameters) == len(chosen)
    torch.testing.assert_close(sizes.perturbation, torch.stack([e.norm() for e in moves]))
    torch.testing.assert_close(sizes.weights, torch.stack([p.detach().norm() for p in chosen]))


@pytest.mark.parametrize(
    'options',
    [dict(dtype='float16', loss_scale=512.0), dict(dtype='bfloat16'), dict(accumulative_counts=2)],
    ids=['float16', 'bfloat16', 'accumulation'],
)
def test_a_loss_scale_and_accumulation_do_not_change_the_length(options: dict[str, Any]) -> None:
    model = make()
    wrapper = build('sam', model, rho=0.1, **options)
    wrapper.record_sizes = True
    for batch in batches(3):
        model.train_step(batch, wrapper)
        scale = scale_of(wrapper.last_step.sizes, model)
        assert scale.whole.perturbation == pytest.approx(0.1, rel=1e-3)
        assert scale.slope == pytest.approx(0.1 * wrapper.last_step.grad_norm.item(), rel=1e-3)


SLOPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f'sam {adaptive}': ('sam', dict(rho=0.05, adaptive=adaptive)) for adaptive in (False, True, *RELATIVE)},
    'gsam below lr_max': ('gsam', dict(rho=0.5, adaptive=True, lr_max=0.4)),
    'esam': ('esam', dict(rho=0.5, adaptive=True, beta=0.5, gamma=1.0)),
    'friendlysam': ('friendlysam', dict(rho=0.05)),
    'friendlysam, adaptive': ('friendlysam', dict(rho=0.5, adaptive=True)),
}


@pytest.mark.parametrize('case', SLOPES)
def test_linearity_is_by_the_perturbation_and_the_gradient_of_the_step(case: str) -> None:
    name, options = SLOPES[case]
    model, reference = make(), make()
    wrapper = build(name, model, **options)
    wrapper.record_sizes = True
    seen: list[list[Tensor]] = []
    model.register_forward_pre_hook(lambda *_: seen.append([p.detach().clone() for p in model.parameters()]))
    for batch in batches(3):  # in the first one Friendly SAM still perturbs along the gradient
        seen.clear()
        reference.load_state_dict(model.state_dict())
        model.train_step(batch, wrapper)
        gradients = gradients_of(loss_of(reference, batch), list(reference.parameters()))
        slope = sum(((there - here) * g).sum() for here, there, g in zip(*seen, gradients, strict=True))
        step = wrapper.last_step
        linearity = (step.perturbed_loss - step.loss) / slope
        assert ScaleReport(wrapper, model).log_scalars(step)['linearity'] == pytest.approx(linearity.item(), rel=1e-3)


def test_the_gradients_of_a_measured_step_are_let_go() -> None:
    model = make()
    wrapper = build('sam', model)
    for wrapper.record_sizes in (True, False):
        model.train_step(batches(1)[0], wrapper)
        assert wrapper._two_pass.ascent._plain == []


@pytest.mark.parametrize('name', WRAPPERS)
def test_measuring_changes_nothing(name: str) -> None:
    models = make(), make()
    wrappers = [build(name, model) for model in models]
    wrappers[0].record_sizes = True
    for batch in batches(4):
        for model, wrapper in zip(models, wrappers, strict=True):
            model.train_step(batch, wrapper)
    assert same_state(*models)
    assert wrappers[1].last_step.sizes is None


def test_a_gradient_that_is_not_finite_has_no_scale() -> None:
    model = make()
    wrapper = build('sam', model)
    wrapper.record_sizes = True
    (batch,) = batches(1)
    batch['inputs'][0] = math.nan
    model.train_step(batch, wrapper)
    report = ScaleReport(wrapper, model)
    report.introduce(wrapper.last_step)
    assert not report.introduced
    assert report.log_scalars(wrapper.last_step) == {}


# ---------------------------------------------------------------- in a run
@MODELS.register_module()
class Lopsided(ToyNet):
    """A convolution with weights of a norm of over 100 before a BatchNorm: what it computes is the same."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.conv.weight.mul_(100)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What is logged, with its level."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(scale_report, 'print_log', lambda message, logger, level: lines.append((level, message)))
    return lines


def warnings(said: list[tuple[int, str]]) -> list[str]:
    return [message for level, message in said if level == logging.WARNING]


def train(work_dir: Path, wrapper: dict[str, Any], *, interval: int = 1, epochs: int = 2, **changes: Any) -> Runner:
    optimizer = dict(type='SGD', lr=wrapper.pop('lr', 0.01), momentum=0.9)
    config = toy_config(
        work_dir / 'run',
        optim_wrapper=dict(type='SAMOptimWrapper', optimizer=optimizer) | wrapper,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),  # of 5 steps
        default_hooks=dict(logger=dict(type='LoggerHook', interval=interval)),
        **changes,
    )
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def last(runner: Runner, name: str) -> float:
    return float(runner.message_hub.get_scalar(f'train/sharpness/{name}').current())


def logged(runner: Runner) -> set[str]:
    return {key.removeprefix('train/sharpness/') for key in runner.message_hub.log_scalars}


def test_one_line_says_what_is_perturbed(tmp_path: Path, said: list[tuple[int, str]]) -> None:
    train(tmp_path, dict(rho=0.05, perturb='weights'), interval=100, epochs=1)
    model = toy_config(tmp_path)['model']
    ((level, line),) = said
    assert (level, model['type']) == (logging.INFO, 'ToyNet')
    start, _, where = line.partition('; ')
    assert start.startswith('SAMOptimWrapper: the first step perturbs 2 of 6 tensors, by ')
    assert start.endswith(" % of the weights' norm")
    share, name = where.split(' % of the perturbation is in ')
    assert name in ('conv', 'head')
    assert 50 <= float(share) <= 100, 'of two layers, the larger share'


def test_the_line_waits_for_a_second_pass_and_a_finite_gradient(said: list[tuple[int, str]]) -> None:
    model = make()
    wrapper = build('sam', model)
    report = ScaleReport(wrapper, model)
    report.introduce(StepRecord(torch.ones(())))
    assert (said, report.introduced) == ([], False)


def test_the_scalars(tmp_path: Path) -> None:
    runner = train(tmp_path, dict(rho=0.1, lr=0.0), epochs=1)
    weights = torch.cat([parameter.detach().flatten() for parameter in runner.model.parameters()]).norm().item()
    assert last(runner, 'rho_relative') == pytest.approx(0.1 / weights, rel=1e-5)
    shares = {name: last(runner, name) for name in logged(runner) if name.startswith('share_')}
    assert set(shares) == {'share_conv', 'share_norm', 'share_head'}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_parts_that_are_left_out_have_no_share(tmp_path: Path) -> None:
    runner = train(tmp_path, dict(rho=0.1, perturb=dict(include=['^conv'])), epochs=1)
    assert [last(runner, f'share_{part}') for part in ('conv', 'norm', 'head')] == [pytest.approx(1.0), 0.0, 0.0]


def test_only_logged_steps_and_the_first_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = scale_report.scale_of
    monkeypatch.setattr(scale_report, 'scale_of', lambda *args: asked.append(1) or original(*args))
    measured: list[bool] = []
    original_step = SAMOptimWrapper.update_params

    def step(self: SAMOptimWrapper, *args: Any, **kwargs: Any) -> None:
        original_step(self, *args, **kwargs)
        measured.append(self.last_step.sizes is not None)

    monkeypatch.setattr(SAMOptimWrapper, 'update_params', step)
    train(tmp_path, dict(rho=0.05), interval=3)
    assert measured == [True, False, True, False, True, False, False, True, False, True]
    assert len(asked) == 5, 'the host asks for the sizes more often than they are logged'


def test_nothing_moves_at_rho_0(tmp_path: Path, said: list[tuple[int, str]]) -> None:
    runner = train(tmp_path, dict(rho=0.0))
    assert [line for _, line in said] == [
        "SAMOptimWrapper: the first step perturbs 6 of 6 tensors, by 0 % of the weights' norm"
    ]
    assert last(runner, 'rho_relative') == last(runner, 'share_head') == 0.0


NORMAL = {
    'sam': dict(rho=0.1),
    'asam': dict(rho=0.5, adaptive=True),
    'by tensor': dict(rho=0.05, adaptive='tensor', perturb='weights'),
    'by layer': dict(rho=0.05, adaptive='layer'),
    'esam': dict(type='ESAMOptimWrapper', rho=0.1),
    'esam history': dict(type='ESAMOptimWrapper', rho=0.1, selection='history', gamma=0.25),
    'ausam': dict(type='AUSAMOptimWrapper', rho=0.1),
    'looksam': dict(type='LookSAMOptimWrapper', rho=0.1, k=2),
    'bfloat16': dict(rho=0.1, dtype='bfloat16'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', NORMAL)
def test_normal_runs_are_silent(name: str, tmp_path: Path, said: list[tuple[int, str]]) -> None:
    train(tmp_path, dict(NORMAL[name]), epochs=9)
    assert warnings(said) == []
    assert len(said) == 1


def test_nearly_all_in_a_small_part(tmp_path: Path, said: list[tuple[int, str]]) -> None:
    runner = train(tmp_path, dict(rho=0.1), model=dict(type='Lopsided'))
    (message,) = [line for line in warnings(said) if 'hardly perturbed' in line]
    assert ' % of the perturbation is in head, which has ' in message
    assert ', while head is moved by ' in message
    assert f'Write {RECOMMENDED} (rho as' in message
    assert r"perturb=dict(exclude=[r'\bhead\b'])" in message
    assert last(runner, 'share_head') > 0.75


@pytest.mark.parametrize(
    'way_out',
    [dict(rho=0.05, adaptive='tensor', perturb='weights'), dict(rho=0.1, perturb=dict(exclude=[r'\bhead\b', 'norm']))],
    ids=['by tensor', 'left out'],
)
def test_its_ways_out(way_out: dict[str, Any], tmp_path: Path, said: list[tuple[int, str]]) -> None:
    train(tmp_path, dict(way_out), model=dict(type='Lopsided'))
    assert not [line for line in warnings(said) if 'hardly perturbed' in line]


@MODELS.register_module()
class Saturated(ToyNet):
    """A loss that rises to 1 at most."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        return {'loss': 1 - torch.exp(-sum(losses.values()))}


def test_rho_beyond_what_the_gradient_knows_of(tmp_path: Path, said: list[tuple[int, str]]) -> None:
    runner = train(tmp_path, dict(rho=10.0, lr=0.0), model=dict(type='Saturated'))
    (message,) = [line for line in warnings(said) if 'neighbourhood' in line]
    assert ' that the gradient says (medians of the last 5 logged steps). Write ' in message
    assert abs(last(runner, 'linearity')) < 0.25


@pytest.mark.parametrize('quantized', [False, True])
def test_a_rise_that_rounding_has_eaten_is_not_blamed_on_rho(quantized: bool, said: list[tuple[int, str]]) -> None:
    model = nn.Linear(2, 2)
    if quantized:
        model.weight_quant = nn.Identity()
        model.weight_quant.is_quant_enabled = True
    report = ScaleReport(SAMOptimWrapper(SGD(model.parameters(), lr=0.1), rho=0.1), model)
    sizes = PerturbationSizes(list(model.parameters()), torch.full((2,), 0.1), torch.ones(2), torch.tensor(0.14))
    for _ in range(5):
        report.log_scalars(StepRecord(torch.ones(()), torch.full((), 1.001), torch.ones(()), sizes=sizes))
    assert len(warnings(said)) == (0 if quantized else 1)


@pytest.mark.parametrize('adaptive', [False, True, *RELATIVE])
def test_by_a_small_step_the_loss_rises_linearly(adaptive: bool | str, tmp_path: Path) -> None:
    runner = train(tmp_path, dict(rho=1e-3, adaptive=adaptive), epochs=1)
    assert last(runner, 'linearity') == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize('adaptive', [False, 'tensor'])
def test_rho_that_is_negligible(adaptive: bool | str, tmp_path: Path, said: list[tuple[int, str]]) -> None:
    train(tmp_path, dict(rho=1e-4, adaptive=adaptive), epochs=9)
    (message,) = warnings(said)
    assert 'rho=0.0001 is negligible' in message
    assert 'rho=0.0005' in message
    assert ("adaptive='tensor'" in message) == (adaptive is False)


def test_rho_that_leaves_the_neighbourhood(tmp_path: Path, said: list[tuple[int, str]]) -> None:
    train(tmp_path, dict(rho=20.0, lr=0.0))
    (message,) = [line for line in warnings(said) if 'neighbourhood' in line]
    assert 'rho=20 leaves the neighbourhood' in message
    assert 'a smaller rho, such as rho=4' in message
    assert message.endswith('See docs/scale.md')


# ---------------------------------------------------------------- parts of a model
def test_parts_are_below_what_all_names_share() -> None:
    assert top_level(['backbone.conv.weight', 'backbone.bn.bias', 'head.weight']) == ['backbone', 'backbone', 'head']
    assert top_level(['model.backbone.conv.weight', 'model.head.weight']) == ['backbone', 'head']
    assert top_level(['model.conv.weight', 'model.conv.bias']) == ['conv', 'conv']
    assert top_level(['scale', 'conv.weight']) == ['scale', 'conv']


def test_of_many_parts_the_rest_is_put_together() -> None:
    model = nn.ModuleDict({f'part{i}': nn.Linear(2, 2, bias=False) for i in range(7)})
    wrapper = SAMOptimWrapper(SGD(model.parameters(), lr=0.1))
    report = ScaleReport(wrapper, model)
    for moves in (torch.arange(7.0), torch.arange(7.0).flip(0)):  # the names are those of the first step
        sizes = PerturbationSizes(list(model.parameters()), moves, torch.ones(7), torch.ones(()))
        step = StepRecord(torch.ones(()), torch.full((), 1.2), torch.ones(()), sizes=sizes)
        scalars = report.log_scalars(step)
        assert set(scalars) == {'rho_relative', 'linearity', 'share_rest', *(f'share_part{i}' for i in (3, 4, 5, 6))}
        squares = moves.square() / moves.square().sum()
        assert scalars['share_part6'] == pytest.approx(squares[6].item())
        assert scalars['share_rest'] == pytest.approx(squares[:3].sum().item())
        assert scalars['rho_relative'] == pytest.approx(math.sqrt(91 / 7))


def test_parts_with_names_of_other_scalars() -> None:
    names = ['seen', 'rest', *(f'part{i}' for i in range(4))]
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})
    moves = torch.arange(6.0, 0.0, -1.0)
    sizes = PerturbationSizes(list(model.parameters()), moves, torch.ones(6), torch.ones(()))
    report = ScaleReport(SAMOptimWrapper(SGD(model.parameters(), lr=0.1)), model)
    scalars = report.log_scalars(StepRecord(torch.ones(()), torch.full((), 1.2), torch.ones(()), sizes=sizes))
    shares = moves.square() / moves.square().sum()
    found = [scalars[f'share_{name}'] for name in ('seen_part', 'rest_part', 'part0', 'part1', 'rest')]
    assert found == pytest.approx([*shares[:4].tolist(), shares[4:].sum().item()])
    assert 'share_seen' not in scalars  # the share of the samples seen, of ESAM and AUSAM


def test_a_model_in_one_part_has_no_shares() -> None:
    model = nn.ModuleDict({'only': nn.Linear(2, 2)})
    sizes = PerturbationSizes(list(model.parameters()), torch.ones(2), torch.ones(2), torch.ones(()))
    report = ScaleReport(SAMOptimWrapper(SGD(model.parameters(), lr=0.1)), model)
    assert set(report.log_scalars(StepRecord(torch.ones(()), torch.ones(()), torch.ones(()), sizes=sizes))) == {
        'rho_relative',
        'linearity',
    }


@MODELS.register_module()
class LossNamed(ToyNet):
    """Has parts whose names hold what MMEngine's log processor smooths by."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_scale, self.time_shift = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        weights = [(part.weight - targets.mean()).square().sum() for part in (self.loss_scale, self.time_shift)]
        return losses if mode != 'loss' else {**losses, 'loss_weights': sum(weights)}


def test_shares_are_of_one_iteration_whatever_a_part_is_called(tmp_path: Path) -> None:
    runner = train(tmp_path, dict(rho=0.1), model=dict(type='LossNamed'))
    entries = [json.loads(line) for line in next(tmp_path.rglob('scalars.json')).read_text().splitlines()]
    named = ['sharpness/share_loss_scale', 'sharpness/share_time_shift']
    for name in named:
        history = runner.message_hub.get_scalar(f'train/{name}').data[0]
        assert [entry[name] for entry in entries] == history.tolist()
        assert len(set(history)) == len(entries) == 10
    for entry in entries:
        assert sum(value for name, value in entry.items() if 'share_' in name) == pytest.approx(1)


def test_a_mean_that_is_asked_for_is_still_one(tmp_path: Path) -> None:
    smoothed = dict(data_src='sharpness/L_w', log_name='mean_of_all', method_name='mean', window_size='global')
    runner = train(tmp_path, dict(rho=0.1), log_processor=dict(custom_cfg=[smoothed]))
    entry = json.loads(next(tmp_path.rglob('scalars.json')).read_text().splitlines()[-1])
    history = runner.message_hub.get_scalar('train/sharpness/L_w').data[0]
    assert entry['mean_of_all'] == pytest.approx(history.mean())
    assert entry['sharpness/L_w'] == history[-1]
