"""The floors under the methods' steps: the passes that they consist of, and nothing else. No time is asserted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mm_sharp.analysis import benchmark
from mm_sharp.analysis.benchmark import Candidate, Quartiles, StepLimit, Table
from mm_sharp.analysis.benchmark.methods import whole_settings
from mm_sharp.analysis.benchmark.passes_only import SUFFIX, Floor, Pass, make_floor, own_work, passes_of
from mm_sharp.analysis.benchmark.workload import Ready, prepared
from tests.tool_runs import tool as load
from tests.toys import Notes, ToyNet, batches, make, toy_config

N = 8
HALF = {'gamma': 0.5, 'beta': 0.6, 'refresh': 10}


@pytest.fixture(autouse=True)
def _in_scope() -> Iterator[None]:
    with prepared('mmengine'):
        yield


@pytest.mark.parametrize(
    ('kind', 'settings', 'passes'),
    [
        ('OptimWrapper', {}, None),
        ('SAMOptimWrapper', {}, [Pass(N), Pass(N)]),
        ('AUSAMOptimWrapper', {'sampling_ratio': 0.6}, [Pass(5), Pass(5)]),
        ('ESAMOptimWrapper', {**HALF, 'selection': 'exact'}, [Pass(N, 0.6), Pass(N, None), Pass(4)]),
        ('ESAMOptimWrapper', {**HALF, 'selection': 'history'}, [Pass(N, 0.6), Pass(4)]),
        (
            'ESAMOptimWrapper',
            {**HALF, 'selection': 'history', 'refresh': 1},
            [Pass(N, 0.6), Pass(N, None), Pass(4)],
        ),
        ('ESAMOptimWrapper', {**HALF, 'selection': 'exact', 'gamma': 1.0}, [Pass(N, 0.6), Pass(N)]),
    ],
)
def test_passes_of_each_method(kind: str, settings: dict[str, Any], passes: list[Pass] | None) -> None:
    assert passes_of(kind, settings, N) == passes


class Seen:
    """Notes each forward pass of a model: its samples, whether it is differentiated, and for how many tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[tuple[int, bool, int]] = Notes()
        self.parameters = list(model.parameters())
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        trained = sum(parameter.requires_grad for parameter in self.parameters)
        self.passes.append((len(kwargs['inputs']), torch.is_grad_enabled(), trained))


def floor_of(tmp_path: Path, lr: float = 0.1, **settings: Any) -> tuple[Floor, ToyNet]:
    """The floor under a method's step on the toy."""
    model = make()
    model.data_preprocessor = Ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    cfg = Config(toy_config(tmp_path))
    base = Candidate('x' + SUFFIX, model, benchmark_wrapper(optimizer))
    return make_floor(base, whole_settings(cfg, settings), N), model


def benchmark_wrapper(optimizer: torch.optim.Optimizer) -> Any:
    from mmengine.optim import OptimWrapper

    return OptimWrapper(optimizer)


@pytest.mark.parametrize(
    ('settings', 'sizes', 'differentiated'),
    [
        ({'type': 'SAMOptimWrapper'}, [N, N], [True, True]),
        ({'type': 'AUSAMOptimWrapper', 'sampling_ratio': 0.5}, [4, 4], [True, True]),
        ({'type': 'ESAMOptimWrapper'}, [N, N, 4], [True, False, True]),
        ({'type': 'ESAMOptimWrapper', 'selection': 'history'}, [N, 4], [True, True]),
    ],
)
def test_a_step_is_its_passes(
    tmp_path: Path, settings: dict[str, Any], sizes: list[int], differentiated: list[bool]
) -> None:
    floor, model = floor_of(tmp_path, **settings)
    seen = Seen(model)
    (batch,) = batches(1, N)
    for _ in range(20):
        floor.step(batch)
    steps = [seen.passes[i : i + len(sizes)] for i in range(0, len(seen.passes), len(sizes))]
    assert len(steps) == 20
    whole = len(seen.parameters)
    for step in steps:
        assert [size for size, *_ in step] == sizes
        assert [graph for _, graph, _ in step] == differentiated
        assert [trained for *_, trained in step[1:]] == [whole] * (len(sizes) - 1)
    first = [step[0][2] for step in steps]
    if settings['type'] == 'ESAMOptimWrapper':
        assert min(first) < whole
        assert sum(first) / len(first) == pytest.approx(0.6 * whole, rel=0.25)
    else:
        assert first == [whole] * 20
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_last_pass_is_stepped_with(tmp_path: Path) -> None:
    floor, model = floor_of(tmp_path, type='AUSAMOptimWrapper', sampling_ratio=0.5)
    (batch,) = batches(1, N)
    by_hand = copy.deepcopy(model)
    floor.step(batch)
    part: dict[str, Any] = {key: value[:4] for key, value in batch.items()}
    by_hand(**part)  # the first pass, which moves BatchNorm's statistics alone
    losses = by_hand(**part)
    loss: Tensor = by_hand.parse_losses(losses)[0]
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9).step()
    ours, theirs = model.state_dict(), by_hand.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_own_work_is_what_is_above_the_floor() -> None:
    times = {
        'base': [1.0, 2.0, 4.0],
        'sam': [2.5, 4.4, 9.2],
        'sam' + SUFFIX: [2.0, 4.0, 8.0],
        'history': [9.0, 3.0, 9.0],
        'history' + SUFFIX: [1.0, 2.6, 1.0],
    }
    limits = {'base': StepLimit(1, 1), 'sam': StepLimit(2, 2), 'history': StepLimit(1.4, 1.5, refresh=2)}
    found = own_work(times, limits, steps_before=0)
    assert list(found) == ['sam', 'history']
    assert found['sam'] == Quartiles(*map(pytest.approx, (0.25, 0.3, 0.4)))
    # Of its steps the first and the third refresh.
    assert found['history'] == Quartiles(*map(pytest.approx, (0.2, 0.2, 0.2)))


def test_floors_are_rows_of_the_table_and_have_no_phases(tmp_path: Path) -> None:
    cfg = Config(toy_config(tmp_path, optim_wrapper={'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}}))
    names = ['base', 'sam', 'esam-history']
    settings = {m.name: benchmark.wrapper_settings(cfg, m) for m in benchmark.parse_methods(names)}
    table = benchmark.measure_table(cfg, settings, batch_size=4, rounds=10, warmup=1, floors=True)
    limits = {row.label: row.limit for row in table.rows}
    assert limits['sam' + SUFFIX] == limits['sam'] == 2.0
    assert limits['esam-history' + SUFFIX] == limits['esam-history, between refreshes']
    assert list(table.phases) == names
    assert list(table.own) == ['sam', 'esam-history']
    assert 'above the passes alone, % of a base step' in table.text()
    figures = table.figures()
    assert set(figures['own_work']['sam']) == {'low', 'median', 'high'}
    benchmark.draw_chart([table], tmp_path / 'chart.png', 'toy')
    assert (tmp_path / 'chart.png').stat().st_size > 1000


@pytest.mark.parametrize('options', [[], ['--floors']])
def test_the_tool_asks_for_floors(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    tool, asked = load('benchmark'), []

    def measured(*args: Any, floors: bool) -> Table:
        asked.append(floors)
        return Table(4, 1, [], {}, {}, {}, {})

    monkeypatch.setattr(tool, 'configure', lambda args: (Config({'train_dataloader': {'batch_size': 4}}), {}))
    monkeypatch.setattr(benchmark, 'keep_freed_memory', lambda: False)
    monkeypatch.setattr(benchmark, 'measure_table', measured)
    tool.measure_steps(tool.parse_arguments(['config.py', *options]))
    assert asked == [bool(options)]
