"""Modules whose attributes are not read before and after each pass: none of them is changed by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mm_sharp.ops.module_state import StatePlan
from mm_sharp.ops.module_tree import ModuleTree, own_values
from mm_sharp.ops.stateless import assigns_nothing
from mm_sharp.quantization import calibrate
from tests.quantized_toys import POLICIES, batches, quantized, uncalibrated


def plan_of(model: nn.Module) -> StatePlan:
    return StatePlan(ModuleTree(model))


def skipped(model: nn.Module) -> list[nn.Module]:
    """Brevitas's modules whose attributes are not read."""
    read = {id(held) for held in plan_of(model).attributes._held}
    own = [module for module in model.modules() if type(module).__module__.startswith('brevitas.')]
    return [module for module in own if id(vars(module)) not in read]


@pytest.mark.parametrize('calibrated', [True, False])
@pytest.mark.parametrize('policy', POLICIES)
def test_what_is_not_read_does_not_change(policy: str, calibrated: bool) -> None:
    # In calibration quantizers collect statistics, count, and begin to learn their scales.
    model = (quantized if calibrated else uncalibrated)(policy).train()
    modules = skipped(model)
    assert len(modules) > 100
    before = [list(map(id, own_values(module))) for module in modules]
    if not calibrated:
        calibrate(model, batches(2))
    for batch in batches(3):
        sum(model(**batch, mode='loss').values()).sum().backward()
    assert [list(map(id, own_values(module))) for module in modules] == before


def test_classes_that_assign_are_read() -> None:
    from brevitas.core.quant.delay import _DelayQuant
    from brevitas.core.scaling import ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling
    from brevitas.core.stats.stats_op import MSE
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector

    kinds: tuple[Any, ...] = (ParameterFromRuntimeStatsScaling, ParameterFromStatsFromParameterScaling, MSE)
    assert not any(map(assigns_nothing, (*kinds, ActQuantProxyFromInjector, _DelayQuant)))


def test_only_brevitas_is_looked_into() -> None:
    from brevitas.core.function_wrapper import Identity

    class Derived(Identity):  # type: ignore[misc]
        pass

    class Plain(nn.Module):
        pass

    assert assigns_nothing(Identity)
    assert not assigns_nothing(Derived)
    assert not assigns_nothing(Plain)
    assert not assigns_nothing(nn.Module)  # who uses it as it is may give it anything


@pytest.mark.parametrize(
    'method',
    [
        lambda self: setattr(self, 'count', 1),
        lambda self: vars(self).update(count=1),
        lambda self: [setattr(self, 'count', i) for i in range(2)],
        property(lambda self: 1, lambda self, value: self.__dict__.update(count=value)),
        staticmethod(lambda module: module.register_buffer('count', torch.zeros(()))),
        torch.no_grad()(lambda self: setattr(self, 'count', 1)),
        len,
    ],
)
def test_ways_to_assign(method: Any) -> None:
    def forward(self: Any) -> None:
        self.count += 1

    for name, value in (('forward', forward), ('other', method)):
        kind = type('Kind', (nn.Module,), {name: value, '__module__': 'brevitas.core.made_up'})
        assert not assigns_nothing(kind)
    assert assigns_nothing(type('Kind', (nn.Module,), {'value': 1, '__module__': 'brevitas.core.made_up'}))


def test_what_holds_a_list_is_read_though_its_class_assigns_nothing() -> None:
    from brevitas.core.function_wrapper import Identity

    model = nn.Sequential(Identity(), Identity())
    model[1].seen = []
    assert [id(held) for held in plan_of(model).attributes._held] == [id(vars(model[1]))]
