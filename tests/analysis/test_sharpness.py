"""Sharpness: eigenvalues, trace, balls and landscapes against closed forms, and what a measurement leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from mm_sharp.analysis.sharpness import measures
from mm_sharp.analysis.sharpness.loading import Samples
from mm_sharp.analysis.sharpness.measure import measure
from mm_sharp.analysis.sharpness.measures import (
    ball_sharpness,
    filter_direction,
    filter_norms,
    hutchinson,
    line,
    plane,
    top_eigenvalues,
)  # fmt: skip
from mm_sharp.analysis.sharpness.objective import Objective, preserved_eval_mode
from mm_sharp.errors import UsageError
from mm_sharp.samples.indexed_dataset import IndexedDataset
from tests.sharpness import QUICK, figures, rows_of
from tests.toys import CountingNet, Functional, ToyNet, batches, make, same_bits, same_state


def toy_samples(count: int = 8) -> Samples:
    (batch,) = batches(1, count)
    return rows_of(**batch)


class Regression(BaseModel):
    """A model with a loss module: ``loss(body(inputs), targets)``, in float64."""

    def __init__(self, body: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.body, self.loss_module = body.double(), loss

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'tensor') -> Any:
        return {'loss': self.loss_module(self.body(inputs), targets)}


class Quadratic(BaseModel):
    """Losses ``s_i (a_i . w)^2 / 2 + b_i . w`` of samples, so that H = mean of s_i a_i a_i'; of shape (N,)."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights.clone())

    def forward(self, a: Tensor, b: Tensor, s: Tensor, mode: str = 'tensor') -> Any:
        return {'loss': s * (a @ self.w.flatten()) ** 2 / 2 + b @ self.w.flatten()}


def quadratic(spectrum: list[float], seed: int = 0) -> tuple[Quadratic, Samples, Tensor, Tensor]:
    """A quadratic whose Hessian has a given spectrum: model, samples, Hessian, gradient."""
    generator = torch.Generator().manual_seed(seed)
    values, size = torch.tensor(spectrum, dtype=torch.float64), len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    weights = torch.randn(size, generator=generator, dtype=torch.float64)
    slopes = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rows = (size * values.abs())[:, None].sqrt() * basis.T
    hessian = basis @ torch.diag(values) @ basis.T
    gradient = hessian @ weights + slopes.mean(0)
    return Quadratic(weights), rows_of(a=rows, b=slopes, s=values.sign()), hessian, gradient


def objective_of(model: nn.Module, data: Samples, batch_size: int = 3) -> Objective:
    return Objective(model.eval(), data, list(model.parameters()), batch_size)


@pytest.mark.parametrize('as_tuple', [False, True])
def test_the_ids_of_an_indexed_data_set_are_no_argument_of_the_model(as_tuple: bool) -> None:
    model, data, _, _ = quadratic([2.0, 1.0])
    rows = [tuple(row.values()) for row in data.rows] if as_tuple else data.rows
    indexed = IndexedDataset(rows)
    keyed = replace(data, rows=[indexed[index] for index in range(len(rows))])
    assert objective_of(model, keyed).loss_and_gradient()[0] == objective_of(model, data).loss_and_gradient()[0]


def close(found: float, expected: float, tolerance: float = 1e-9) -> bool:
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)


# ------------------------------------------------------------------- Hessian
SPECTRUM = [5.0, 4.5, 1.0, *[0.1] * 30, 0.0, -0.5, -40.0]  # of largest magnitude is the lowest


@pytest.mark.parametrize('batch_size', [1, 7, 100])
def test_the_largest_eigenvalues_of_a_known_spectrum(batch_size: int) -> None:
    model, data, hessian, _ = quadratic(SPECTRUM)
    objective = objective_of(model, data, batch_size)
    found = top_eigenvalues(objective, 3, 1e-4, seed=0)
    assert found.values == pytest.approx([5.0, 4.5, 1.0], rel=1e-6)
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        assert close(float(vector.norm()), 1)
        assert close(residual, float((hessian @ vector - value * vector).norm()))
        assert residual <= 1e-3 * value
    assert found.products >= 20


def test_an_eigenvalue_is_within_its_residual_of_the_true_one() -> None:
    model, data, *_ = quadratic([1 + 0.01 * i for i in range(60)])
    objective = objective_of(model, data)
    found = top_eigenvalues(objective, 1, 0.02, seed=0)
    assert 0 < found.residuals[0] <= 0.02 * 1.59 * 1.1
    assert min(abs(found.values[0] - (1 + 0.01 * i)) for i in range(60)) <= found.residuals[0]


def test_all_eigenvalues_may_be_negative_or_zero() -> None:
    model, data, *_ = quadratic([-1.0, -2.0, -3.0, -4.0])
    objective = objective_of(model, data)
    assert top_eigenvalues(objective, 2, 1e-6, seed=0).values == pytest.approx([-1, -2])
    model, data, *_ = quadratic([0.0, 0.0, 0.0, 0.0])
    objective = objective_of(model, data)
    found = top_eigenvalues(objective, 2, 1e-6, seed=0)
    assert (found.values, found.residuals) == ([0.0, 0.0], [0.0, 0.0])


def test_what_does_not_converge_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, '_RESTARTS', 1)
    model, data, *_ = quadratic([1 + 1e-4 * i for i in range(60)])
    found = measure(model, data, replace(QUICK, tolerance=1e-12))
    assert found.eigenvalues is not None
    assert found.eigenvalues.values == []
    assert found.differences == {}
    (remark,) = found.remarks
    assert 'did not converge' in remark
    assert '0 of 1' in remark


def test_linear_regression() -> None:
    """H = 2 X'X / n, with no bias."""
    inputs, targets = torch.randn(11, 6).double(), torch.randn(11, 1).double()
    model = Regression(nn.Linear(6, 1, bias=False), nn.MSELoss())
    objective = objective_of(model, rows_of(inputs=inputs, targets=targets), 4)
    expected = torch.linalg.eigvalsh(2 * inputs.T @ inputs / 11).flip(0)
    found = top_eigenvalues(objective, 3, 1e-8, seed=1)
    assert found.values == pytest.approx(expected[:3].tolist())


def full_hessian(model: Regression, data: Samples) -> Tensor:
    """By torch.func.hessian, over all samples at once, (size, size)."""
    batch = default_collate(data.rows)
    names = [name for name, _ in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in model.parameters()])
        shaped = {n: v.view_as(p) for n, v, p in zip(names, pieces, model.parameters(), strict=True)}
        return torch.func.functional_call(model, shaped, (), batch)['loss']

    start = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.func.hessian(loss)(start)


def classifier() -> tuple[Regression, Samples]:
    """A softmax classifier with a hidden layer and a BatchNorm, whose statistics are not a new one's."""
    norm = nn.BatchNorm1d(7)
    norm.running_mean.copy_(0.3 * torch.randn(7))
    norm.running_var.copy_(0.5 + torch.rand(7))
    body = nn.Sequential(nn.Linear(4, 7), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
    inputs, labels = torch.randn(13, 4).double(), torch.randint(0, 3, (13,))
    return Regression(body, nn.CrossEntropyLoss()), rows_of(inputs=inputs, targets=labels)


@pytest.mark.parametrize('batch_size', [5, 13])
def test_a_softmax_classifier_against_its_full_hessian(batch_size: int) -> None:
    model, data = classifier()
    with preserved_eval_mode(model):
        expected = full_hessian(model, data)
        objective = Objective(model, data, list(model.parameters()), batch_size)
        columns = objective.hessian_times(list(torch.eye(objective.size).double()))
        assert torch.allclose(torch.stack(columns, 1), expected, rtol=1e-9, atol=1e-12)
        found = top_eigenvalues(objective, 2, 1e-8, seed=0)
        trace = hutchinson(objective, 200, seed=0)
    values = torch.linalg.eigvalsh(expected).flip(0)
    assert values[-1] < -1e-3, 'this Hessian is to have negative eigenvalues'
    assert found.values == pytest.approx(values[:2].tolist(), rel=1e-6)
    assert abs(trace.value - float(expected.trace())) < 4 * trace.standard_error
    # The variance of one draw is twice the sum of the squares off the diagonal.
    off = expected - torch.diag(expected.diagonal())
    assert trace.standard_error == pytest.approx(math.sqrt(2 * float(off.pow(2).sum()) / 200), rel=0.2)


def test_the_trace_of_a_diagonal_matrix_has_no_error() -> None:
    diagonal = torch.tensor([3.0, -1.0, 0.5]).double()
    times = lambda vectors: [diagonal * vector for vector in vectors]  # noqa: E731
    matrix: Any = SimpleNamespace(size=3, device='cpu', hessian_times=times)
    trace = hutchinson(matrix, 12, seed=0)
    assert (trace.value, trace.standard_error, trace.draws) == (pytest.approx(2.5), pytest.approx(0), 12)


# ------------------------------------------------------------- balls and landscapes
def test_one_step_along_the_gradient_of_a_quadratic() -> None:
    model, data, hessian, gradient = quadratic(SPECTRUM)
    objective = objective_of(model, data)
    loss, found = objective.loss_and_gradient()
    assert torch.allclose(found, gradient)
    unit = gradient / gradient.norm()
    for rho in (0.01, 2.0):
        expected = float(rho * gradient.norm() + rho**2 / 2 * unit @ hessian @ unit)
        ball = ball_sharpness(objective, loss, found, rho, 0)
        assert close(ball.one_step, expected)
        assert ball.ascent is None


def test_the_ascent_finds_more_within_the_ball_and_never_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, *_ = quadratic([9.0, 1.0, 0.5, 0.1])
    for row in data.rows:
        row['b'] = row['b'] * 1e-6
    model.w.data.zero_()  # nearly a minimum: the largest rise is rho^2 lambda / 2, along the first eigenvector
    objective = objective_of(model, data)
    loss, gradient = objective.loss_and_gradient()
    norms, moved = [], objective.moved
    monkeypatch.setattr(objective, 'moved', lambda offset: norms.append(float(offset.norm())) or moved(offset))
    few, many = (ball_sharpness(objective, loss, gradient, 0.5, steps) for steps in (2, 20))
    largest = 0.5**2 * 9 / 2
    assert few.one_step == many.one_step
    assert few.ascent is not None
    assert many.ascent is not None
    assert few.one_step < few.ascent <= many.ascent <= largest * (1 + 1e-4)
    assert many.ascent > 0.99 * largest
    assert max(norms) <= 0.5 * (1 + 1e-12)
    assert len(norms) == 3 + 21


def test_a_rise_is_never_below_zero_but_a_step_may_be() -> None:
    model, data, *_ = quadratic([-9.0, -9.0, -9.0, -9.0])
    objective = objective_of(model, data)
    loss, gradient = objective.loss_and_gradient()
    ball = ball_sharpness(objective, loss, gradient, 50.0, 1)
    assert ball.one_step < 0
    assert ball.ascent == pytest.approx(0, abs=1e-9)


def test_the_landscape_of_a_quadratic() -> None:
    model, data, hessian, gradient = quadratic([3.0, 1.0, 0.5, -2.0, 0.1, 0.2])
    objective = objective_of(model, data)
    loss, _ = objective.loss_and_gradient()
    first, second = torch.randn(2, 6).double()

    def expected(offset: Tensor) -> float:
        return loss + float(gradient @ offset + offset @ hessian @ offset / 2)

    places = [-1.0, 0.0, 0.3]
    assert line(objective, first, places) == pytest.approx([expected(t * first) for t in places])
    found = plane(objective, (first, second), places)
    for t, values in zip(places, found, strict=True):
        assert values == pytest.approx([expected(s * first + t * second) for s in places])
    assert found[1][1] == loss


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))


def test_filters_of_a_direction_have_the_norms_of_the_weights() -> None:
    model = Layers()
    with torch.no_grad():
        model.head.weight[1] = 0
    flat = filter_direction(model, model.parameters(), seed=3)
    pieces = flat.split([parameter.numel() for parameter in model.parameters()])
    found = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), pieces, strict=True)}
    for layer, dims in ((model.conv, (1, 2, 3)), (model.head, (1,))):
        name = 'conv.weight' if layer is model.conv else 'head.weight'
        norms = (layer.weight.double().pow(2).sum(dims), found[name].pow(2).sum(dims))
        assert torch.allclose(*norms)
    assert found['head.weight'][1].abs().max() == 0
    # Output channels 0 to 3 come from the first half of the inputs, 4 to 7 from the second.
    for half in (slice(0, 3), slice(3, 6)):
        weights, direction = model.up.weight[half].double(), found['up.weight'][half]
        assert torch.allclose(direction.pow(2).sum((0, 2, 3)), weights.pow(2).sum((0, 2, 3)))
    for name in ('conv.bias', 'norm.weight', 'norm.bias', 'up.bias', 'head.bias', 'scale'):
        assert found[name].abs().max() == 0
    assert found['conv.weight'].abs().min() > 0


def test_filter_norms_of_a_vector_of_embeddings() -> None:
    assert filter_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == [[5, 5], [1, 1]]


def test_directions_go_by_seed_number_and_name() -> None:
    model, other = Layers(), nn.Module()
    other.head = copy.deepcopy(model.head)  # another model with a layer of the same name and weights
    same = filter_direction(model, [model.head.weight], 3)
    assert same_bits(same, filter_direction(other, [other.head.weight], 3))
    for seed, number in ((4, 0), (3, 1)):
        different = filter_direction(model, [model.head.weight], seed, number)
        assert abs(float(same @ different)) < 0.9 * float(same @ same)


# ------------------------------------------------------------ sums and means
class SumOfSquares(nn.MSELoss):
    def __init__(self) -> None:
        super().__init__(reduction='sum')


class Mixed(Regression):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2), nn.MSELoss())
        self.other_loss = SumOfSquares()

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'tensor') -> Any:
        output = self.body(inputs)
        return {'loss': self.loss_module(output, targets), 'loss_sum': self.other_loss(output, targets)}


def pairs(count: int = 7) -> Samples:
    return rows_of(inputs=torch.randn(count, 4).double(), targets=torch.randn(count, 2).double())


@pytest.mark.parametrize(
    ('build', 'averaging', 'factor', 'remark'),
    [
        (lambda: Regression(nn.Linear(4, 2), nn.MSELoss()), 'mean over the batch', 1, ''),
        (lambda: Regression(nn.Linear(4, 2), SumOfSquares()), 'sum over the batch', 2, 'adds the losses of a batch up'),
    ],
)
def test_nothing_depends_on_the_batches(
    build: Callable[[], Regression], averaging: str, factor: float, remark: str
) -> None:
    model, data = build(), pairs()
    batch = default_collate(data.rows)
    mean = (model.body(batch['inputs']) - batch['targets']).pow(2).mean().item()
    findings = []
    for size in (1, 3, 7, 100):
        objective = objective_of(model, data, size)
        assert objective.averaging == averaging
        assert remark in objective.remark
        findings.append(figures(measure(model, data, replace(QUICK, batch_size=size))))
        assert close(findings[-1]['loss'], factor * mean)
    for other in findings[1:]:
        for name, value in findings[0].items():
            assert other[name] == pytest.approx(value, rel=1e-6), name  # the eigenvalue stops at a tolerance


def test_sums_and_means_together_are_exact_in_batches_of_one_and_say_so() -> None:
    model, data = Mixed(), pairs()
    batch = default_collate(data.rows)
    mean = (model.body(batch['inputs']) - batch['targets']).pow(2).mean().item()
    objective = objective_of(model, data, 1)
    assert close(objective.loss_at(torch.zeros(objective.size)), 3 * mean)
    assert (objective.averaging, 'unless it is 1' in objective.remark) == ('by share', True)


def test_a_loss_that_no_hook_sees_counts_by_share_and_says_so() -> None:
    model = make(Functional)
    objective = objective_of(model, toy_samples(), 3)
    assert objective.averaging == 'by share'
    assert 'depends on --batch-size' in objective.remark
    assert 'ESAM' not in objective.remark
    zero = torch.zeros(objective.size)
    whole = objective_of(model, toy_samples(), 8).loss_at(zero)
    assert objective.loss_at(zero) == pytest.approx(whole)  # this one is a mean all the same


# ------------------------------------------------- what is measured, and left behind
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_a_measurement_leaves_no_trace_and_repeats(dtype: str) -> None:
    model, data = make(CountingNet).train(), toy_samples()
    model.dropout.p = 0.5
    model.norm.eval()  # a frozen one stays so
    before, state = copy.deepcopy(model), torch.get_rng_state()
    settings = replace(QUICK, dtype=dtype, eigenvalues=2)
    first, second = (measure(model, data, settings) for _ in range(2))
    assert same_state(model, before)
    assert (model.training, model.norm.training, model.calls) == (True, False, 0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert same_bits(torch.get_rng_state(), state)
    for found in (first, second):
        found.seconds.clear()
        assert found.eigenvalues is not None
    assert same_bits(first.eigenvalues.vectors, second.eigenvalues.vectors)
    assert figures(first) == figures(second)
    other = measure(model, data, replace(settings, seed=1))
    assert figures(other)['line'] != figures(first)['line']
    assert figures(other)['trace'] != figures(first)['trace']
    assert figures(other)['one_step'] == figures(first)['one_step']


def test_weights_come_back_after_an_error() -> None:
    model, data = make(ToyNet), toy_samples()
    before = copy.deepcopy(model)
    objective = objective_of(model, data)

    def interrupted() -> None:
        with objective.moved(torch.ones(objective.size)):
            assert not same_state(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same_state(model, before)


def test_evaluation_mode_whatever_mode_the_model_is_in() -> None:
    model, data = make(ToyNet, dropout=0.9), toy_samples()
    batch = default_collate(data.rows)
    model.eval()
    expected = sum(model(**batch).values()).item()
    model.train()
    found = measure(model, data, QUICK)
    assert found.loss == pytest.approx(expected)
    assert found.line[1] == found.plane[1][1] == found.loss


def test_activation_checkpointing_changes_nothing() -> None:
    plain, recomputed = make(ToyNet), make(ToyNet, with_cp=True)
    data = toy_samples()
    assert figures(measure(plain, data, QUICK)) == figures(measure(recomputed, data, QUICK))
    assert recomputed.with_cp


def test_float64_and_float32_agree() -> None:
    model, data = make(ToyNet), toy_samples()
    single, double = (measure(model, data, replace(QUICK, dtype=dtype)) for dtype in ('float32', 'float64'))
    for name, value in figures(double).items():
        assert figures(single)[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert next(model.parameters()).dtype == torch.float32


def test_the_curvature_by_differences_is_the_eigenvalue() -> None:
    model, data = classifier()
    found = measure(model, data, replace(QUICK, rhos=(0.01, 0.02), tolerance=1e-6))
    assert found.eigenvalues is not None
    for value in found.differences.values():
        assert value == pytest.approx(found.eigenvalues.values[0], rel=0.01)


def test_which_parameters_move() -> None:
    model, data = make(ToyNet), toy_samples()
    model.conv.weight.requires_grad_(False)  # frozen: no optimizer would move it
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = measure(model, data, QUICK)
    assert found.parameters == found.all_parameters - sizes['conv.weight']
    assert measure(model, data, replace(QUICK, perturb='weights')).parameters == sizes['head.weight']


def test_parts_can_be_left_out() -> None:
    settings = replace(QUICK, eigenvalues=0, trace_draws=0, landscape=(), ascent_steps=0)
    found = measure(make(ToyNet), toy_samples(), settings)
    assert (found.eigenvalues, found.trace, found.differences, found.line, found.plane) == (None, None, {}, [], [])
    assert found.balls[0].one_step > 0
    assert asdict(found)['surrogate'] is False


def test_a_landscape_may_leave_where_the_loss_is_finite() -> None:
    model, data, *_ = quadratic([1.0, 2.0, 3.0])
    objective = objective_of(model, data)
    values = line(objective, torch.full((3,), 1e200, dtype=torch.float64), [0.0, 1.0])
    assert math.isfinite(values[0])
    assert not math.isfinite(values[1])


# -------------------------------------------------------------------- errors
class Once(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Twice(Once):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Body(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 2), wrap

    def forward(self, inputs: Tensor) -> Tensor:
        return self.wrap(self.layer(inputs))


def test_a_loss_without_second_derivatives_is_named() -> None:
    model = Regression(Body(Once.apply), nn.MSELoss())
    with pytest.raises(UsageError, match=r'Regression: its loss has no second derivatives \(Once is marked'):
        measure(model, pairs(), QUICK)
    found = measure(model, pairs(), replace(QUICK, eigenvalues=0, trace_draws=0))
    assert found.balls[0].one_step > 0


def test_functions_with_a_backward_of_their_own_are_named() -> None:
    model, data = Regression(Body(Twice.apply), nn.MSELoss()), pairs()
    found = measure(model, data, QUICK)
    assert found.remarks == ["second derivatives are as right as the model's own backward passes make them: Twice"]
    plain = Regression(Body(torch.square), nn.MSELoss())
    plain.load_state_dict(model.state_dict())
    assert figures(measure(plain, data, QUICK))['trace'] == pytest.approx(figures(found)['trace'])


def test_hardsigmoid_has_second_derivatives_meanwhile() -> None:
    """torch's own has none; RTMPose's backbone uses it."""
    values = torch.linspace(-5, 5, 41)
    expected = nn.functional.hardsigmoid(values)
    model = Regression(nn.Sequential(nn.Linear(4, 2), nn.Hardsigmoid()), nn.MSELoss())
    with preserved_eval_mode(model):
        assert torch.allclose(nn.functional.hardsigmoid(values), expected)
        assert torch.allclose(nn.Hardsigmoid(inplace=True)(values.clone()), expected)
    assert nn.functional.hardsigmoid.__module__ == 'torch.nn.functional'
    equal = Regression(nn.Sequential(model.body[0], nn.Hardtanh(-3, 3)), nn.MSELoss())
    data = pairs()
    for row in data.rows:
        row['targets'] = row['targets'] * 6 - 3
    found = measure(equal, data, QUICK).trace
    for row in data.rows:
        row['targets'] = (row['targets'] + 3) / 6
    assert found is not None
    assert figures(measure(model, data, QUICK))['trace'] == pytest.approx(found.value / 36)


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_checkpointing_that_no_switch_ends_is_refused() -> None:
    model = Regression(Body(lambda value: checkpoint(torch.tanh, value, use_reentrant=True)), nn.MSELoss())
    with pytest.raises(UsageError, match=r'has no derivatives .*checkpoint.*compatible with .grad'):
        measure(model, pairs(), QUICK)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    model, data = make(ToyNet), toy_samples()
    model.head.weight.data[0] = value
    with pytest.raises(UsageError, match=r'the loss is (nan|inf) at the weights'):
        measure(model, data, QUICK)


def test_a_loss_of_training_mode_alone() -> None:
    class Training(Regression):
        def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'tensor') -> Any:
            return super().forward(inputs if self.training else None, targets)  # type: ignore[arg-type]

    model = Training(nn.Linear(4, 2), nn.MSELoss())
    with pytest.raises(UsageError, match='Training: its loss cannot be computed in evaluation mode'):
        measure(model, pairs(), QUICK)
    assert model.training


def test_more_eigenvalues_than_parameters() -> None:
    model, data, *_ = quadratic([1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match='--eigenvalues 3: there are only 3 parameters'):
        measure(model, data, replace(QUICK, eigenvalues=3))


def test_a_loss_without_parameters() -> None:
    model = Regression(Body(torch.Tensor.detach), nn.MSELoss())
    with pytest.raises(UsageError, match='does not depend on any parameter'):
        measure(model, pairs(), QUICK)
