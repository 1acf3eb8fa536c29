"""The measure of oscillating weights: the paper's recursion, and the hook that logs it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from mm_sharp.quantization import OscillationHook
from mm_sharp.quantization.oscillation_hook import SCALAR, Oscillation, weight_integers
from tests.quantized_toys import quantized


class Hub:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, float]] = []

    def update_scalar(self, name: str, value: float) -> None:
        self.logged.append((name, value))


def test_frequencies_are_those_of_the_papers_recursion() -> None:
    """By hand, weight by weight: a change against the direction of the last change is an oscillation."""
    paths = np.array([
        [0, 1, 0, 1, 1, 0, 1],  # to and fro
        [0, 1, 2, 3, 4, 5, 6],  # on and on
        [0, 0, 0, 0, 0, 0, 0],
        [3, 2, 2, 2, 3, 3, -4],  # back after a rest, and back again
    ])  # fmt: skip
    expected = []
    for path in paths:
        frequency, last = 0.0, 0
        for before, now in pairwise(path):
            direction = int(np.sign(now - before))
            frequency = 0.1 * float(direction * last < 0) + 0.9 * frequency
            last = direction or last
        expected.append(frequency)
    steps = torch.tensor(paths.T, dtype=torch.int16)
    found = Oscillation.start(steps[0])
    for integers in steps[1:]:
        found.add(integers, 0.1)
    assert found.frequency.tolist() == pytest.approx(expected)
    assert expected[1] == expected[2] == 0


def test_integers_are_those_of_the_quantized_weights() -> None:
    model = quantized('zero points')
    for name, integers in weight_integers(model).items():
        layer: Any = model.get_submodule(name)
        weight = layer.quant_weight()
        again = (integers - weight.zero_point) * weight.scale
        assert torch.allclose(again, weight.value, atol=1e-6)
        assert integers.dtype is torch.int16
    assert weight_integers(nn.Linear(2, 2)) == {}


def test_the_share_is_of_all_weights_and_logged_in_intervals() -> None:
    model, hub = quantized('W4A4'), Hub()
    hook = HOOKS.build(dict(type='OscillationHook', interval=2, momentum=1.0, threshold=0.5))
    runner = SimpleNamespace(model=model, message_hub=hub, iter=0)
    scale = model.branch.quant_weight().scale.detach().flatten()[0]
    weight = model.branch.weight.detach()
    weight[0, 0, 0, 0] = 0
    hook.before_train(runner)
    total = sum(integers.numel() for integers in weight_integers(model).values())
    for runner.iter, sign in enumerate((1, -1, 1, 1)):
        weight[0, 0, 0, 0] += 2 * sign * scale
        hook.after_train_iter(runner, runner.iter)
    assert [name for name, _ in hub.logged] == [SCALAR, SCALAR]
    assert hub.logged[0][1] == pytest.approx(1 / total)
    assert hub.logged[1][1] == 0


def test_float_models_log_nothing() -> None:
    hub = Hub()
    runner = SimpleNamespace(model=nn.Linear(2, 2), message_hub=hub, iter=9)
    hook = OscillationHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert hub.logged == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), r'OscillationHook: interval=0 is not allowed'),
        (dict(momentum=0), r'OscillationHook: momentum=0 is not allowed.*\(0, 1\]'),
        (dict(threshold=1.5), r'OscillationHook: threshold=1\.5 is not allowed'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillationHook(**arguments)
