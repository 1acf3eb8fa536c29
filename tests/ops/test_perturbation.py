"""The mathematics of the perturbation against references, and exact restoration."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_sharp.ops.multi_tensor import _kernels, add_scaled_
from mm_sharp.ops.perturbation import (
    RELATIVE,
    Direction,
    asam_stretches,
    global_norm,
    group_by_device_and_dtype,
    perturb_,
)
from mm_sharp.ops.tensor_backup import TensorBackup
from tests.references import asam_perturbation, relative_perturbation, sam_perturbation
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
    adaptive: bool | str = False,
    eta: float = 0.01,
    **kwargs: Any,
) -> Tensor:
    """:func:`perturb_` in SAM's direction, ASAM's, or relative to the weights."""
    if isinstance(adaptive, str):
        return perturb_(weights, gradients, Direction(rho, relative=adaptive), **kwargs)
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


@pytest.mark.parametrize('relative', RELATIVE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_relative_perturbations_equal_the_formula(relative: str, dtype: torch.dtype) -> None:
    weights, gradients = tensors(0, *SHAPES, dtype=dtype), tensors(1, *SHAPES, dtype=dtype)
    moves = relative_perturbation(weights, gradients, 0.02, relative)
    expected = [w + e for w, e in zip(weights, moves, strict=True)]
    norm = perturb(weights, [g.clone() for g in gradients], 0.02, adaptive=relative)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    sizes = [w.norm() if relative == 'tensor' else 1.0 for w in tensors(0, *SHAPES, dtype=dtype)]
    by_hand = sum((size * g).square().sum() for size, g in zip(sizes, gradients, strict=True)).sqrt()
    assert norm.item() == pytest.approx(by_hand.item(), rel=1e-6)


@given(seed=st.integers(0, 99), sizes=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
def test_rho_is_the_relative_size_whatever_the_tensors_sizes(seed: int, sizes: list[float]) -> None:
    """Of 'layer' in each tensor, of 'global' over all; of 'tensor' the relative changes have rho as their norm."""
    start = [w * size for w, size in zip(tensors(seed, *SHAPES, dtype=torch.float64), sizes, strict=True)]
    for relative in RELATIVE:
        weights = [w.clone() for w in start]
        gradients = tensors(seed + 1, *SHAPES, dtype=torch.float64)
        perturb(weights, gradients, 0.02, adaptive=relative)
        moves = [w - s for w, s in zip(weights, start, strict=True)]
        shares = torch.stack([e.norm() / s.norm() for e, s in zip(moves, start, strict=True)])
        if relative == 'layer':
            torch.testing.assert_close(shares, torch.full_like(shares, 0.02), rtol=1e-6, atol=0)
        else:
            found = shares.norm() if relative == 'tensor' else global_norm(moves) / global_norm(start)
            assert found.item() == pytest.approx(0.02, rel=1e-6)


def test_by_tensor_the_direction_does_not_depend_on_how_a_tensor_is_scaled() -> None:
    """A layer before a normalisation may be of any size: the gradient is as much smaller as its weights are larger."""
    weights, gradients = tensors(0, *SHAPES, dtype=torch.float64), tensors(1, *SHAPES, dtype=torch.float64)
    sizes = (1.0, 10.0, 0.01, 1e3)
    scaled = [w * size for w, size in zip(weights, sizes, strict=True)]
    perturb(scaled, [g / size for g, size in zip(gradients, sizes, strict=True)], 0.02, adaptive='tensor')
    perturb(weights, gradients, 0.02, adaptive='tensor')
    for ours, theirs, size in zip(scaled, weights, sizes, strict=True):
        torch.testing.assert_close(ours, theirs * size, rtol=1e-12, atol=0)


@pytest.mark.parametrize('relative', ['tensor', 'layer'])
def test_a_tensor_that_is_zero_stays(relative: str) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    weights[1].zero_()
    before = [w.clone() for w in weights]
    perturb(weights, gradients, 0.02, adaptive=relative)
    assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [False, True, False, False]
    perturb([weights[1]], [torch.ones(5)], 0.02, adaptive=relative)
    assert torch.equal(weights[1], torch.zeros(5))


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
    for adaptive in (False, True, *RELATIVE):
        gradients = [torch.zeros_like(w) for w in weights]
        assert perturb(weights, gradients, 0.05, adaptive=adaptive).item() == 0.0
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('adaptive', [False, True, *RELATIVE])
def test_a_gradient_that_is_not_finite_leaves_every_weight(bad: float, adaptive: bool | str) -> None:
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    weights[0][0, 0] = -0.0
    gradients[1][2] = bad
    before = [w.clone() for w in weights]
    norm = perturb(weights, gradients, 0.05, adaptive=adaptive)
    assert not torch.isfinite(norm)
    assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize('bad', [None, math.nan, math.inf])
def test_a_device_that_is_not_asked_agrees_with_the_host(bad: float | None) -> None:
    """Whoever cannot wait for the norm leaves every weight, too, where it is not finite, and forgets the gradients."""
    weights, gradients = tensors(0, *SHAPES), tensors(1, *SHAPES)
    results = [[w.clone() for w in weights] for _ in range(2)]
    if bad is not None:
        gradients[0][0, 0] = bad
    finite, each = torch.isfinite(global_norm(gradients)), torch.full((len(SHAPES),), 0.3)
    for moved, step in zip(results, (torch.tensor(0.3), each), strict=True):
        taken = [g.clone() for g in gradients]
        add_scaled_(moved, taken, step, finite)
        steps = [g * 0.3 if finite else torch.zeros_like(g) for g in gradients]
        assert all(map(torch.equal, taken, steps))
    expected = [w + g * 0.3 if finite else w for w, g in zip(weights, gradients, strict=True)]
    assert all(map(torch.equal, results[0], expected))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert torch.equal(results[0][1], weights[1]) == (bad is not None)


@pytest.mark.skipif(find_spec('triton') is not None, reason='Triton is installed')
def test_without_triton_a_gpu_has_no_kernels() -> None:
    assert _kernels(torch.device('cuda', 0)) is None


@pytest.mark.parametrize('loss_scale', [2.0**16, 0.25, 1000.0])
@pytest.mark.parametrize('adaptive', [False, *RELATIVE])
def test_loss_scaling_cancels(loss_scale: float, adaptive: bool | str) -> None:
    plain, scaled = tensors(0, *SHAPES), tensors(0, *SHAPES)
    gradients = tensors(1, *SHAPES)
    norm = perturb(plain, [g.clone() for g in gradients], 0.05, adaptive=adaptive)
    inverse, gradients = torch.tensor(1 / loss_scale), [g * loss_scale for g in gradients]
    unscaled = perturb(scaled, gradients, 0.05, adaptive=adaptive, inverse_grad_scale=inverse)
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


@pytest.mark.parametrize('relative', RELATIVE)
def test_relative_perturbations_of_mixed_dtypes(relative: str) -> None:
    """Half-precision squares would overflow: the norms are in float32 at least."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    values = [torch.full((100,), 1e3), torch.full((5,), 2.0), torch.full((7,), 300.0), torch.ones(3)]
    weights = [value.to(kind, copy=True) for value, kind in zip(values, kinds, strict=True)]
    gradients = [torch.linspace(-2, 1, len(value)) for value in values]
    moves = relative_perturbation(values, gradients, 0.5, relative)
    perturb(weights, [g.to(kind, copy=True) for g, kind in zip(gradients, kinds, strict=True)], 0.5, adaptive=relative)
    for weight, value, move, kind in zip(weights, values, moves, kinds, strict=True):
        assert weight.dtype == kind
        # Where w + e is about 0, a number of bfloat16 is as far off as w is rounded.
        tolerance = 1e-2 if kind == torch.bfloat16 else 1e-4
        torch.testing.assert_close(weight.float(), value + move, rtol=0, atol=tolerance * value.max().item())


@settings(max_examples=50)
@given(
    st.lists(floats, min_size=1, max_size=30),
    st.lists(floats, min_size=1, max_size=30),
    st.sampled_from([False, True, *RELATIVE]),
)
def test_restoration_is_exact_whatever_the_values(left: list[float], right: list[float], adaptive: bool | str) -> None:
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
