"""The rise of the loss over a grid of rho: equal to steps of SAM, and to what is computed by hand; and the proposal."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.optim import SGD

from mm_sharp import SAMOptimWrapper
from mm_sharp.analysis.find_rho.measure import BatchRises, RhoProbe, measure, perturbation_of, training_config
from mm_sharp.analysis.find_rho.report import Findings, Point, points_of, propose, shares_of, text
from mm_sharp.config.preflight import check_wrappers
from mm_sharp.errors import RECOMMENDED_SCALE
from mm_sharp.hooks.scale import Part, Scale
from tests import quantized_toys
from tests.tool_runs import OPTIM_WRAPPERS, Tools, write_toy
from tests.toys import Batch, ToyNet, batches, make, same_state

RHOS = [0.01, 0.1, 0.5]


def measured(model: BaseModel, batch: Any, rhos: list[float] = RHOS, **arguments: Any) -> BatchRises:
    found = RhoProbe(SGD(model.parameters(), lr=0.1), rhos, **arguments).measure(model, batch)
    assert found is not None
    return found


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'adaptive': True},
        {'adaptive': 'tensor', 'perturb': 'weights'},
        {'adaptive': 'layer', 'perturb': 'weights'},
        {'adaptive': 'global', 'perturb': {'include': ['head']}},
        {'dtype': 'bfloat16'},
        {'dtype': 'float16', 'loss_scale': 64.0},
    ],
    ids=str,
)
def test_the_rises_are_those_of_sams_steps(arguments: dict[str, Any]) -> None:
    (batch,) = batches(1)
    model = make(dropout=0.3)
    optimizer = SGD(model.parameters(), lr=0.1)
    probe, before = RhoProbe(optimizer, RHOS, **arguments), copy.deepcopy(model)
    torch.manual_seed(3)
    found = probe.measure(model, batch)
    assert found is not None
    assert same_state(model, before)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    for rho, rise in zip(RHOS, found.rises, strict=True):
        other = copy.deepcopy(before)
        wrapper = SAMOptimWrapper(SGD(other.parameters(), lr=0.1), rho=rho, **arguments)
        torch.manual_seed(3)
        other.train_step(batch, wrapper)
        step = wrapper.last_step
        assert step is not None
        assert step.perturbed_loss is not None
        assert found.loss == float(step.loss)
        assert rise == float(step.perturbed_loss) - float(step.loss)


def by_hand(model: ToyNet, batch: Batch, rho: float, relative: bool) -> tuple[float, float]:
    """Rise and slope, of SAM's e or of the one that is relative to the weights' norms."""
    losses = model(**batch)
    loss = losses['loss_square'] + losses['loss_size']
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    t = [float(w.detach().norm()) if relative else 1.0 for w in model.parameters()]
    norm = math.sqrt(sum((s * float(g.norm())) ** 2 for s, g in zip(t, gradients, strict=True)))
    moves = [rho * s**2 * g / norm for s, g in zip(t, gradients, strict=True)]
    with torch.no_grad():
        for weight, move in zip(model.parameters(), moves, strict=True):
            weight.add_(move)
        losses = model(**batch)
    rise = float(losses['loss_square'] + losses['loss_size'] - loss.detach())
    return rise, sum(float((e * g).sum()) for e, g in zip(moves, gradients, strict=True)) / rho


@pytest.mark.parametrize('adaptive', [False, 'tensor'])
def test_rise_and_slope_are_what_is_computed_by_hand(adaptive: bool | str) -> None:
    (batch,) = batches(1)
    found = measured(make(), batch, adaptive=adaptive)
    for rho, rise in zip(RHOS, found.rises, strict=True):
        expected, slope = by_hand(make(), batch, rho, adaptive == 'tensor')
        assert rise == pytest.approx(expected, rel=1e-3)
        assert found.slope == pytest.approx(slope, rel=1e-5)


def test_quantized_weights_that_are_perturbed_themselves() -> None:
    (batch,) = quantized_toys.batches(1)
    model = quantized_toys.quantized()
    before = quantized_toys.plain_state(model), quantized_toys.parameters_of(model)
    found = measured(model, batch, perturb_quantized=True)
    assert quantized_toys.plain_state(model) == before[0]
    assert not quantized_toys.unequal(quantized_toys.parameters_of(model), before[1])
    for rho, rise in zip(RHOS, found.rises, strict=True):
        other = quantized_toys.quantized()
        wrapper = SAMOptimWrapper(SGD(other.parameters(), lr=0.1), rho=rho, perturb_quantized=True)
        other.train_step(batch, wrapper)
        step = wrapper.last_step
        assert step is not None
        assert step.perturbed_loss is not None
        assert rise == pytest.approx(float(step.perturbed_loss) - float(step.loss), rel=1e-4)


class Quadratic(BaseModel):
    """L = a . w + curvature / 2 * |w|^2, whatever the batch."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.weights, self.curvature = nn.Parameter(torch.tensor([3.0, 4.0]).double()), curvature

    def forward(self, a: Tensor, mode: str) -> dict[str, Tensor]:
        return {'loss': a @ self.weights + self.curvature / 2 * self.weights.square().sum()}


def test_a_linear_loss_has_linearity_1_and_a_quadratic_one_rises_by_its_formula() -> None:
    batch = {'a': torch.tensor([3.0, 4.0]).double()}
    found = measured(Quadratic(0.0), batch)
    assert [point.linearity for point in points_of(RHOS, [found, found])] == pytest.approx([1.0] * 3)
    # g = a + 2 w = (9, 12), so the loss rises by |g| rho + rho^2.
    found = measured(Quadratic(2.0), batch)
    assert found.rises == pytest.approx([15 * rho + rho**2 for rho in RHOS])
    points = points_of(RHOS, [found, found])
    assert [point.linearity for point in points] == pytest.approx([1 + rho / 15 for rho in RHOS])
    assert [point.relative for point in points] == pytest.approx([rho / 5 for rho in RHOS])


def test_a_batch_without_a_gradient_is_left_out() -> None:
    for value in (0.0, math.nan):
        model = Quadratic(0.0)
        batch = {'a': torch.full((2,), value).double()}
        assert RhoProbe(SGD(model.parameters(), lr=0.1), RHOS).measure(model, batch) is None


def test_the_noise_is_the_standard_error_and_shares_are_means() -> None:
    parts = [Part('backbone', 3.0, 1.0), Part('head', 4.0, 1.0)], [Part('backbone', 5.0, 1.0), Part('head', 0.0, 1.0)]
    scales = [Scale(Part('', 5.0, 10.0), own, own, 2, 0.0) for own in parts]
    found = [BatchRises(1.0, 4.0, [0.4], scales[0]), BatchRises(2.0, 6.0, [0.6], scales[1])]
    (point,) = points_of([0.1], found)
    assert (point.rise, point.expected, point.loss, point.relative) == pytest.approx((0.5, 0.5, 1.5, 0.5))
    assert point.noise == pytest.approx(0.1)
    assert shares_of(found) == pytest.approx({'backbone': 0.68, 'head': 0.32})


def points(*linearities: float, noise: float = 0.0, loss: float = 100.0) -> list[Point]:
    """At rho 1, 2, …; the loss would rise by rho, were it linear."""
    return [Point(n, n * value, noise, float(n), loss, 0.0) for n, value in enumerate(linearities, 1)]


@pytest.mark.parametrize(('loss', 'early'), [(2.0, False), (1000.0, True)])
def test_a_rise_that_is_negligible_is_said(loss: float, early: bool) -> None:
    found = Findings(points(1.0, 1.05, 1.5, loss=loss), {'head': 1.0}, 3, 4, 0.1, {}, None, '')
    assert ('measure a model that is trained, by more --steps or --load-from' in text(found)) == early


@pytest.mark.parametrize(
    ('found', 'proposed', 'reason'),
    [
        (points(1.0, 1.05, 1.2, 1.5), 2, '3 has a linearity of 1.20 and raises the loss by 3.6 %'),
        (points(1.0, 0.95, 0.5), 2, 'linearity of 0.50'),
        # What rises faster at first and is bounded looks linear again further out.
        (points(1.0, 1.2, 1.05, 0.6), 1, 'linearity of 1.20'),
        (points(1.0, 1.0), 2, 'larger values of --rho'),
        (points(1.3, 1.6), None, 'smaller values of --rho'),
        (points(1.0, 1.0, noise=2.0), None, 'more --batches'),
        # The first is in the noise, whatever it looks like.
        (points(0.2, 1.0, 1.05, 1.5, noise=0.7), 3, '4 has'),
        (points(1.0, math.nan), 1, 'linearity of nan'),
        # As linear as it may be, the loss rises by too much of what it is.
        (points(1.0, 1.0, 1.0, loss=-25.0), 2, 'raises the loss by 12 %'),
    ],
)
def test_the_proposal_is_the_largest_before_the_first_departure(
    found: list[Point], proposed: float | None, reason: str
) -> None:
    rho, said = propose(found, 0.1)
    assert rho == proposed
    assert reason in said


def toy_config(path: Path, wrapper: str = 'sam', **changes: Any) -> Config:
    return Config.fromfile(write_toy(path / f'{wrapper}.py', wrapper, **changes))


def test_the_grid_lies_around_the_configs_own_rho(tmp_path: Path) -> None:
    own = perturbation_of(toy_config(tmp_path, 'sam'))
    assert (own.own, own.arguments, own.remark) == (0.05, {}, '')
    assert (min(own.rhos()), max(own.rhos())) == (0.005, 0.5)
    assert own.own in own.rhos()
    esam = perturbation_of(toy_config(tmp_path, 'esam-history'))
    assert 'ESAMOptimWrapper chooses its perturbation otherwise' in esam.remark
    quantized = perturbation_of(toy_config(tmp_path, 'esam-history', model=dict(type='QuantizedModel')))
    assert quantized.remark.startswith(esam.remark + '\nrounding has no derivative')
    plain = perturbation_of(toy_config(tmp_path, 'plain'))
    assert {**plain.arguments, 'rho': plain.rhos()[6]} == RECOMMENDED_SCALE
    assert plain.own is None


def test_the_training_is_the_base_optimizers(tmp_path: Path) -> None:
    sampler = dict(type='AUSAMSampler', drop_last=True)
    cfg = toy_config(tmp_path, 'ausam')
    cfg.train_dataloader.batch_sampler, cfg.optim_wrapper.clip_grad = sampler, dict(max_norm=1.0)
    found = training_config(cfg, 'folder')
    check_wrappers(found)
    assert found.optim_wrapper.type == 'SAMOptimWrapper'
    assert (found.optim_wrapper.rho, found.optim_wrapper.clip_grad) == (0.0, dict(max_norm=1.0))
    assert 'batch_sampler' not in found.train_dataloader
    assert found.train_dataloader.drop_last
    del cfg.train_dataloader.batch_sampler['drop_last'], sampler['drop_last']
    assert not training_config(cfg, 'folder').train_dataloader.drop_last
    assert cfg.optim_wrapper.type == 'AUSAMOptimWrapper'
    assert cfg.train_dataloader.batch_sampler == sampler


@pytest.mark.timeout(120)
def test_batches_of_a_sampler_without_end_whose_workers_persist(tmp_path: Path) -> None:
    """They come after those of the training: MMEngine's sampler cannot begin anew."""
    found = []
    for workers in (0, 1):
        cfg = toy_config(tmp_path, 'sam')
        cfg.train_cfg, cfg.experiment_name = dict(by_epoch=False, max_iters=12), f'{workers} workers'
        cfg.train_dataloader.update(sampler=dict(type='InfiniteSampler'), num_workers=workers)
        cfg.train_dataloader.persistent_workers = workers > 0
        found.append(measure(cfg, perturbation_of(cfg), RHOS, 2, 5, trust=False)[0])
    assert len(found[0]) == 5
    assert [batch.loss for batch in found[0]] == [batch.loss for batch in found[1]]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    return Tools(tmp_path, monkeypatch, capsys)


def find(tools: Tools, folder: Path, *arguments: object) -> dict[str, Any]:
    """What the tool writes, of 3 steps and 3 batches."""
    tools('find_rho', *arguments, '--out-dir', folder / 'out', '--batches', 3, '--steps', 3)
    found: dict[str, Any] = json.loads((folder / 'out' / 'find_rho.json').read_text())
    return found


@pytest.mark.slow
def test_a_config_to_a_proposal(tools: Tools, tmp_path: Path) -> None:
    write_toy(tmp_path / 'sam.py', 'sam', optim_wrapper={**OPTIM_WRAPPERS['sam'], **RECOMMENDED_SCALE})
    write_toy(tmp_path / 'plain.py', 'plain')
    first = find(tools, tmp_path, 'sam.py')
    assert first['steps'] == 3
    assert first['batches'] == 3
    assert len(first['points']) == 13
    assert {*first['shares']} == {'conv', 'norm', 'head'}
    assert first['shares']['norm'] == 0
    assert all(point['rise'] > 0 for point in first['points'])
    rho = first['proposed']
    assert all(abs(point['linearity'] - 1) < 0.1 for point in first['points'] if point['rho'] <= rho)
    assert cv2.imread(str(tmp_path / 'out' / 'find_rho.png')).shape[1] > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'plain.py', 'sam.py']
    # The training is the base optimizer's, whatever the config trains with.
    radii = [point['rho'] for point in first['points']]
    assert find(tools, tmp_path, 'plain.py', '--rho', *radii)['points'] == first['points']


@pytest.mark.slow
def test_other_methods_and_weights(tools: Tools, tmp_path: Path) -> None:
    write_toy(tmp_path / 'ausam.py', 'ausam')
    model = make(seed=5)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'there.pth')
    found = find(tools, tmp_path, 'ausam.py', '--rho', 0.3, 0.1, '--seed', 4)
    other = find(tools, tmp_path, 'ausam.py', '--rho', 0.3, 0.1, '--seed', 4, '--load-from', 'there.pth')
    assert [point['rho'] for point in found['points']] == [0.1, 0.3]
    assert found['points'][0]['loss'] != other['points'][0]['loss']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--rho', '0'], '--rho 0: it must be a finite number above 0'),
        (['--rho', '0.1', '0.1'], 'the same value twice'),
        (['--batches', '1'], '--batches 1: it must be at least 2'),
        (['--tolerance', 'nan'], '--tolerance nan: it must be'),
        (['--steps', '10'], '--steps 10: it must be below 10, the steps of the training'),
        (['--load-from', 'gone.pth'], "--load-from: no checkpoint 'gone.pth'"),
        (['--cfg-options', 'train_dataloader=None'], 'train_dataloader is missing'),
        (['--cfg-options', 'train_dataloader.dataset.ann_file=gone'], "no data: 'gone'"),
        (['--cfg-options', 'optim_wrapper.rho=-1'], 'rho=-1'),
        (['--cfg-options', 'strategy.type=DDPStrategy'], 'leave the config'),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tools: Tools, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_toy(tmp_path / 'sam.py', 'sam')
    assert message in tools('find_rho', 'sam.py', *arguments, code=2)


@pytest.mark.parametrize('wrapper', ['sam', 'plain'])
def test_weights_of_another_model(tools: Tools, tmp_path: Path, wrapper: str) -> None:
    write_toy(tmp_path / 'config.py', wrapper)
    torch.save({'state_dict': {'fc.weight': torch.zeros(2, 3)}}, tmp_path / 'other.pth')
    line = tools('find_rho', 'config.py', '--load-from', 'other.pth', '--steps', 0, '--batches', 2, code=2)
    assert "cannot load 'other.pth': the checkpoint holds none of the 6 weights of the model (conv.weight" in line
    assert 'it holds fc.weight' in line


def test_nothing_to_measure(tools: Tools, tmp_path: Path) -> None:
    write_toy(tmp_path / 'sam.py', 'sam')
    (name, values) = ('conv.weight', torch.full((6, 2, 3, 3), math.nan))
    torch.save({'state_dict': {**make().state_dict(), name: values}}, tmp_path / 'nan.pth')
    line = tools('find_rho', 'sam.py', '--load-from', 'nan.pth', '--steps', 0, '--batches', 2, code=2)
    assert 'in none of 2 batches' in line
