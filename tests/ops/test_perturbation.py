"""The mathematics of the perturbation against references, and exact restoration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_sharp.ops.perturbation import (
    Direction,
    _add,
    asam_stretches,
    global_norm,
    group_by_device_and_dtype,
    perturb_,
)
from mm_sharp.ops.tensor_backup import TensorBackup
from tests.references import asam_perturbation, sam_perturbation
from tests.toys import same_bits

floats = st.floats(allow_nan=True, allow_infinity=True, width=32)
finite = st.floats(-1e3, 1e3, width=32)


def tensors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def perturb(
    weights: list[Tensor],
    gradients: list[Tensor],
    rho: float,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    **kwargs: Any,
) -> Tensor:
    """:func:`perturb_` in SAM's direction, or ASAM's."""
    return perturb_(weights, gradients, Direction(rho, asam_stretches(weights, eta) if adaptive else None), **kwargs)


SHAPES = ((3, 4), (5,), (), (2, 1, 2))


@pytest.mark.parametrize('rho', [0.0, 0.05, 2.0])
def test_sam_perturbation_equals_the_formula(rho: float) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    expected = [w + e for w, e in zip(weights, sam_perturbation(gradients, rho), strict=True)]
    norm = perturb(weights, [g.clone() for g in gradients], rho)
    assert all(torch.equal(w, x) for w, x in zip(weights, expected, strict=True))
    assert norm.item() == pytest.approx(np.linalg.norm(np.concatenate([g.numpy().ravel() for g in gradients])))


@pytest.mark.parametrize('eta', [0.0, 0.01])
def test_asam_perturbation_equals_the_formula(eta: float) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    expected = [w + e for w, e in zip(weights, asam_perturbation(weights, gradients, 0.5, eta), strict=True)]
    perturb(weights, [g.clone() for g in gradients], 0.5, adaptive=True, eta=eta)
    assert all(torch.equal(w, x) for w, x in zip(weights, expected, strict=True))


@given(st.lists(finite, min_size=1, max_size=20), st.floats(1e-3, 10))
def test_the_perturbation_has_length_rho(values: list[float], rho: float) -> None:
    gradient = torch.tensor(values, dtype=torch.float64)
    weight = torch.zeros_like(gradient)
    perturb([weight], [gradient.clone()], rho)
    expected = rho if gradient.norm() > 1e-6 else weight.norm().item()
    assert weight.norm().item() == pytest.approx(expected, rel=1e-5)


def test_asam_perturbation_has_length_rho_in_its_own_norm() -> None:
    weights, gradients = tensors(0, *SHAPES, dtype=torch.float64), tensors(1, *SHAPES, dtype=torch.float64)
    before = [w.clone() for w in weights]
    perturb(weights, gradients, 0.5, adaptive=True, eta=0.01)
    scaled = [(w - b) / (b.abs() + 0.01) for w, b in zip(weights, before, strict=True)]
    assert global_norm(scaled).item() == pytest.approx(0.5)


def test_a_zero_gradient_gives_no_perturbation() -> None:
    weights = tensors(0, *SHAPES)
    before = [w.clone() for w in weights]
    assert perturb(weights, [torch.zeros_like(w) for w in weights], 0.05).item() == 0.0
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('adaptive', [False, True])
def test_a_gradient_that_is_not_finite_leaves_every_weight(bad: float, adaptive: bool) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    weights[0][0, 0] = -0.0
    gradients[1][2] = bad
    before = [w.clone() for w in weights]
    norm = perturb(weights, gradients, 0.05, adaptive=adaptive)
    assert not torch.isfinite(norm)
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize('bad', [None, math.nan, math.inf])
def test_a_device_that_is_not_asked_agrees_with_the_host(bad: float | None) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    results = [[w.clone() for w in weights] for _ in range(2)]
    if bad is None:
        _add(results[0], [g.clone() for g in gradients], torch.tensor(0.3), None)
    else:
        gradients[0][0, 0] = bad
    _add(results[1], gradients, torch.tensor(0.3), torch.isfinite(global_norm(gradients)))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert torch.equal(results[0][1], weights[1]) == (bad is not None)


@pytest.mark.parametrize('loss_scale', [2.0**16, 0.25, 1000.0])
def test_loss_scaling_cancels(loss_scale: float) -> None:
    plain, scaled = tensors(0, *SHAPES), tensors(0, *SHAPES)
    gradients = tensors(1, *SHAPES)
    norm = perturb(plain, [g.clone() for g in gradients], 0.05)
    inverse = torch.tensor(1 / loss_scale)
    unscaled = perturb(scaled, [g * loss_scale for g in gradients], 0.05, inverse_grad_scale=inverse)
    assert unscaled.item() == pytest.approx(norm.item(), rel=1e-6)
    for left, right in zip(plain, scaled, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_scale_multiplies_the_perturbation() -> None:
    single, double, gradient = torch.zeros(4), torch.zeros(4), torch.arange(4.0)
    perturb([single], [gradient.clone()], 0.05)
    perturb([double], [gradient.clone()], 0.1)
    torch.testing.assert_close(double, 2 * single)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_norm_of_half_precision_gradients_does_not_overflow(dtype: torch.dtype) -> None:
    gradient = torch.full((100,), 1000.0, dtype=dtype)
    assert global_norm([gradient]).item() == pytest.approx(1e4, rel=1e-3)


def test_mixed_dtypes_share_one_norm() -> None:
    group = [torch.ones(4), torch.ones(5, dtype=torch.float64), torch.ones(7, dtype=torch.bfloat16)]
    assert group_by_device_and_dtype(group) == [[0], [1], [2]]
    assert global_norm(group).item() == pytest.approx(4.0)
    weights = [torch.zeros_like(g) for g in group]
    perturb(weights, group, 1.0)
    assert [w.dtype for w in weights] == [g.dtype for g in group]
    assert weights[0][0].item() == pytest.approx(0.25)
    assert weights[2][0].item() == pytest.approx(0.25)


@settings(max_examples=50)
@given(st.lists(floats, min_size=1, max_size=30), st.lists(floats, min_size=1, max_size=30), st.booleans())
def test_restoration_is_exact_whatever_the_values(left: list[float], right: list[float], adaptive: bool) -> None:
    weights = [torch.tensor(left), torch.tensor(right).reshape(1, -1)]
    before, pointers = [w.clone() for w in weights], [w.data_ptr() for w in weights]
    backup = TensorBackup()
    backup.save(weights)
    perturb(weights, [torch.full_like(w, 0.3) for w in weights], 0.7, adaptive=adaptive)
    weights[0].fill_(math.nan)
    backup.restore()
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == pointers


def test_a_thousand_cycles_change_no_bit() -> None:
    weights, before = tensors(0, *SHAPES), tensors(0, *SHAPES)
    backup = TensorBackup()
    for cycle in range(1000):
        backup.save(weights)
        perturb(weights, tensors(cycle, *SHAPES), 0.05)
        backup.restore()
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))


def test_backup_memory_is_allocated_once() -> None:
    weights, backup = tensors(0, *SHAPES), TensorBackup()
    pointers = set()
    for _ in range(3):
        backup.save(weights)
        pointers.add(tuple(copy.data_ptr() for copy in backup._memory.values()))
        backup.restore()
    assert len(pointers) == 1


def test_backup_memory_goes_with_its_tensor() -> None:
    backup = TensorBackup()
    for size in range(1, 6):
        backup.save([torch.zeros(size)])
        backup.restore()
    assert len(backup._memory) == 0


def test_a_second_save_would_lose_the_first() -> None:
    backup = TensorBackup()
    backup.save([torch.zeros(2)])
    with pytest.raises(RuntimeError, match='have not been restored'):
        backup.save([torch.zeros(2)])
    backup.discard()
    backup.save([torch.zeros(2)])


def test_restore_without_save_does_nothing() -> None:
    backup = TensorBackup()
    backup.restore()
    assert not backup.saved
