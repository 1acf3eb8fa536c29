"""The passes of a method alone: those that its step makes, and nothing else. No time is asserted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from mm_sharp.analysis.benchmark import steps, table
from mm_sharp.analysis.benchmark.candidates import (
    SUFFIX,
    Candidate,
    Pass,
    PassesOnly,
    parse_methods,
    wrapper_settings,
)
from mm_sharp.analysis.benchmark.table import Quartiles, own_work
from mm_sharp.analysis.benchmark.workload import Ready, Workload
from mm_sharp.analysis.prepare import prepared
from tests.tool_runs import tool as load
from tests.toys import Notes, batches, make, same_state, toy_config

N = 8
SGD = {'type': 'SGD', 'lr': 0.1}


class Seen:
    """Notes each forward pass of a model: its samples, whether it is differentiated, and for how many tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[tuple[int, bool, int]] = Notes()
        self.parameters = list(model.parameters())
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        trained = sum(parameter.requires_grad for parameter in self.parameters)
        self.passes.append((len(kwargs['inputs']), torch.is_grad_enabled(), trained))


@pytest.mark.parametrize(
    ('settings', 'sizes'),
    [
        ({'type': 'SAMOptimWrapper', 'dtype': 'bfloat16'}, [N, N]),
        ({'type': 'AUSAMOptimWrapper', 'sampling_ratio': 0.5}, [4, 4]),
        ({'type': 'ESAMOptimWrapper'}, [N, N, 4]),
    ],
)
def test_a_step_makes_the_methods_passes(settings: dict[str, Any], sizes: list[int]) -> None:
    (batch,) = batches(1, N)
    model = make()
    model.data_preprocessor = Ready()
    seen: dict[str, Seen] = {}

    def see(candidate: Candidate, batch: Any) -> None:
        if candidate.name not in seen:
            seen[candidate.name] = Seen(candidate.model)
        candidate.step(batch)
        assert candidate.name == 'x' or all(parameter.grad is None for parameter in candidate.model.parameters())

    with prepared(Config()):
        Workload(model, [batch]).measure({'x': {**settings, 'optimizer': SGD}}, 5, 1, see, passes_only=True)
    method, alone = seen['x'].passes, seen['x' + SUFFIX].passes
    assert [size for size, *_ in alone] == sizes * 5
    assert alone == method


def test_the_last_pass_is_stepped_with() -> None:
    model = make()
    (batch,) = batches(1, N)
    by_hand = copy.deepcopy(model)
    part: dict[str, Any] = {key: value[:4] for key, value in batch.items()}
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, by_hand)]
    trained = [True] * len(list(model.parameters()))
    passes = [Pass((), batch, False, trained), *[Pass((), part, True, trained)] * 2]
    PassesOnly('x', model, OptimWrapper(optimizers[0]), passes).step(None)
    # The first ones move BatchNorm's statistics alone.
    by_hand(**batch)
    by_hand(**part)
    by_hand.parse_losses(by_hand(**part))[0].backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
    assert same_state(model, by_hand)
    assert passes == []


def test_own_work_is_what_is_more_than_the_passes() -> None:
    times = {'base': [1.0, 2.0, 4.0], 'sam': [2.5, 4.4, 9.2], 'sam' + SUFFIX: [2.0, 4.0, 8.0]}
    assert own_work(times) == {'sam': Quartiles(*map(pytest.approx, (0.25, 0.3, 0.4)))}


@pytest.mark.slow
def test_passes_alone_are_rows_of_the_table_and_have_no_phases(tmp_path: Path) -> None:
    cfg = Config(toy_config(tmp_path, optim_wrapper={'type': 'OptimWrapper', 'optimizer': SGD}))
    names = ['base', 'sam', 'esam-history']
    settings = {name: wrapper_settings(cfg, method) for name, method in parse_methods(names).items()}
    found = table.measure_table(cfg, settings, batch_size=4, rounds=10, warmup=1, passes_only=True)
    costs = {row.label: row.theoretical for row in found.rows}
    assert costs['sam' + SUFFIX] == costs['sam'] == 2.0
    assert costs['esam-history' + SUFFIX + ', cycle of 10'] == costs['esam-history, cycle of 10']
    assert list(found.phases) == names
    assert 'more than the passes alone' in found.text()
    figures = found.figures()
    assert list(figures['own_work']) == ['sam', 'esam-history']
    assert set(figures['own_work']['sam']) == {'low', 'median', 'high'}


@pytest.mark.parametrize('options', [[], ['--floors']])
def test_the_tool_asks_for_them(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    tool, asked = load('benchmark'), []

    def measured(*args: Any, passes_only: bool) -> table.Table:
        asked.append(passes_only)
        return table.Table(4, 1, [], {}, {}, {})

    monkeypatch.setattr(tool, 'configure', lambda args: (Config({'train_dataloader': {'batch_size': 4}}), {}))
    monkeypatch.setattr(steps, 'keep_freed_memory', lambda: False)
    monkeypatch.setattr(table, 'measure_table', measured)
    tool.measure_steps(tool.parse_arguments(['config.py', *options]))
    assert asked == [bool(options)]
