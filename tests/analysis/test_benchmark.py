"""The benchmark: methods, ratios, what is in a timed step, and the command line. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config

from mm_sharp.analysis.benchmark import steps
from mm_sharp.analysis.benchmark.candidates import (
    BY_HAND,
    Candidate,
    all_methods,
    parse_methods,
    theoretical_cost,
    wrapper_settings,
)
from mm_sharp.analysis.benchmark.steps import measure_rounds, step_seconds
from mm_sharp.analysis.benchmark.table import Quartiles, compare, measure_host, run_costs, step_table
from mm_sharp.analysis.benchmark.workload import SmallModel, Workload, load_workload
from mm_sharp.analysis.prepare import prepared
from mm_sharp.errors import UsageError
from mm_sharp.step.method import Cost
from tests.conftest import ROOT
from tests.tiny_data import draw_coco
from tests.tool_runs import tool as load
from tests.toys import batches, make, toy_config

METHODS = ['base', 'sam', 'esam', 'esam-history', 'ausam', 'ausam-0.5']
BASE = Cost(1, 1)

# The demo's config with the first stage alone of a narrow ResNet-18, on drawn people; SAM's, so that rho reaches the
# others.
TINY = """
_base_ = '{base}'
model = dict(
    backbone=dict(
        stem_channels=8, base_channels=8, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'),
        num_stages=1, out_indices=(0,), strides=(1,), dilations=(1,),
    ),
    head=dict(in_channels=8, in_featuremap_size=(24, 32)),
)
train_dataloader = dict(batch_size=5, dataset=dict(data_root='{data}'))
"""


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    """tools/benchmark.py as a module."""
    return load('benchmark')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 11 drawn people."""
    folder = tmp_path_factory.mktemp('tiny')
    base = ROOT / 'configs' / 'demo' / 'simcc_res18-half_sam_demo-128x96.py'
    (folder / 'sam.py').write_text(TINY.format(base=base, data=draw_coco(folder / 'people', train=11)))
    return folder / 'sam.py'


@pytest.fixture(autouse=True)
def _freed_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the tests'."""
    monkeypatch.setattr(steps, 'keep_freed_memory', lambda: False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a machine that does other things too, threads of one small step wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy(tmp_path: Path, **changes: Any) -> Config:
    """The toys' training config."""
    return Config(toy_config(tmp_path, **changes))


# -------------------------------------------------------------------- methods
def test_methods_are_the_registered_wrappers() -> None:
    names = list(all_methods())
    assert names[0] == 'base'
    assert {*names} >= {'sam', 'esam', 'ausam'}
    assert parse_methods(['esam-history', 'ausam-small']) == {
        'base': {'type': 'OptimWrapper'},
        'esam-history': {'type': 'ESAMOptimWrapper', 'selection': 'history'},
        'ausam-small': {'type': 'AUSAMOptimWrapper', 'prefer': 'small'},
    }


def test_the_base_optimizer_is_always_measured_and_nothing_twice() -> None:
    assert list(parse_methods(['sam', 'ausam-0.25', 'sam', 'base'])) == ['base', 'sam', 'ausam-0.25']


def test_settings_of_each_method(tmp_path: Path) -> None:
    """Every method keeps what it knows of the config's; the config stays as it is."""
    optimizer = {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4}
    own = {'type': 'AUSAMOptimWrapper', 'rho': 0.2, 'sampling_ratio': 0.3, 'accumulative_counts': 4}
    clipping = {'clip_grad': {'max_norm': 1.0}, 'paramwise_cfg': {'bias_decay_mult': 0}}
    cfg = toy(tmp_path, optim_wrapper={**own, **clipping, 'optimizer': optimizer})
    before = cfg.to_dict()
    found = {name: wrapper_settings(cfg, method) for name, method in parse_methods(METHODS).items()}
    common = {**clipping, 'optimizer': optimizer}
    assert found == {
        'base': {'type': 'OptimWrapper', **common},
        'sam': {'type': 'SAMOptimWrapper', 'rho': 0.2, **common},
        'esam': {'type': 'ESAMOptimWrapper', 'rho': 0.2, **common},
        'esam-history': {'type': 'ESAMOptimWrapper', 'rho': 0.2, 'selection': 'history', **common},
        'ausam': {'type': 'AUSAMOptimWrapper', 'rho': 0.2, 'sampling_ratio': 0.3, **common},
        'ausam-0.5': {'type': 'AUSAMOptimWrapper', 'rho': 0.2, 'sampling_ratio': 0.5, **common},
    }
    assert cfg.to_dict() == before
    costs = {name: theoretical_cost(settings, 10).cycle for name, settings in found.items()}
    assert costs == pytest.approx(
        {'base': 1, 'sam': 2, 'esam': 1.7, 'esam-history': 1.4, 'ausam': 0.6, 'ausam-0.5': 1.0}
    )


# -------------------------------------------------------------------- ratios
def test_ratios_are_paired_by_round() -> None:
    """The machine halves its speed in the last rounds: the ratios do not see it, a ratio of medians would."""
    times = {'base': [1.0, 1.0, 2.0, 2.0, 2.0], 'sam': [1.9, 2.1, 4.0, 4.4, 3.6]}
    base, sam = compare(times, {'base': BASE, 'sam': Cost(2, 2)}, batch_size=8)
    assert base.ratio == Quartiles(1, 1, 1)
    assert base.distance == 0
    assert base.images_per_second == pytest.approx(4)
    assert (sam.ratio.low, sam.ratio.median, sam.ratio.high) == pytest.approx((1.9, 2.0, 2.1))
    assert (sam.seconds.low, sam.seconds.median, sam.seconds.high) == pytest.approx((2.1, 3.6, 4.0))
    assert (sam.theoretical, sam.steps, sam.peak_bytes) == (2, 5, None)
    assert sam.distance == pytest.approx(0)


def test_distance_is_in_percent_of_the_theoretical_cost() -> None:
    costs = {'base': BASE, 'ausam': Cost(1.25, 1.25)}
    rows = compare({'base': [2.0], 'ausam': [2.75]}, costs, 32, peaks={'base': None, 'ausam': 12_345_678})
    assert rows[1].distance == pytest.approx(10)
    lines = step_table(rows).splitlines()
    assert [line.split()[-1] for line in lines] == ['MB', 'n/a', '12.3']


def test_costlier_steps_are_told_from_the_others() -> None:
    """Step 0, 3, 6, ... of a method refreshes; two steps were made before the timed ones."""
    times = {'base': [1.0] * 6, 'esam-history': [1.0, 5.0, 1.0, 2.0, 7.0, 3.0]}
    costs = {'base': BASE, 'esam-history': Cost(1.4, 1.5, 3)}
    _, between, cycle = compare(times, costs, 8, steps_before=2)
    assert between.label == 'esam-history, most steps'
    assert (between.steps, between.ratio.median, between.theoretical) == (4, 1.5, 1.4)
    assert cycle.label == 'esam-history, cycle of 3'
    assert (cycle.steps, cycle.theoretical) == (6, 1.5)
    assert cycle.ratio.median == pytest.approx((2 * 1.5 + 6) / 3)
    assert cycle.seconds.high == pytest.approx((2 * 2.25 + 6.5) / 3)


# -------------------------------------------------------------------- what is timed
def count(calls: list[int], call: Callable[[], Any]) -> float:
    """Instead of a clock: samples that go through the backbone in a step."""
    calls.clear()
    call()
    return float(sum(calls))


@pytest.mark.slow
@pytest.mark.usefixtures('one_thread')
def test_whole_steps_on_whole_batches_are_timed(tiny: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType) -> None:
    """Counted in samples, the forward passes of every method; a refresh of ESAM's history is where it is looked for."""
    calls: list[int] = []
    monkeypatch.setattr(steps, 'seconds_of', partial(count, calls))
    cfg, settings = tool.configure(tool.parse_arguments([str(tiny), '--methods', *METHODS]))
    with prepared(cfg):
        workload = load_workload(cfg, batch_size=5)
    assert [len(batch['inputs']) for batch in workload.batches] == [5, 5]
    assert workload.batches[0]['inputs'].is_floating_point()
    workload.model.backbone.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    weights = {name: value.clone() for name, value in workload.model.state_dict().items()}
    with prepared(cfg):
        times = workload.measure(settings, 10, 1, step_seconds)
    refreshing = [8.0 if step % 10 else 13.0 for step in range(1, 11)]
    assert times == {
        'base': [5.0] * 10, 'sam': [10.0] * 10, 'esam': [13.0] * 10, 'esam-history': refreshing,
        'ausam': [6.0] * 10, 'ausam-0.5': [6.0] * 10,
    }  # fmt: skip
    costs = {name: theoretical_cost(own, 5) for name, own in settings.items()}
    _, *_, between, cycle, _, _ = compare(times, costs, 5, steps_before=1)
    assert between.ratio == Quartiles(1.6, 1.6, 1.6)
    assert cycle.ratio.median == pytest.approx((9 * 1.6 + 2.6) / 10)
    assert all(torch.equal(value, weights[name]) for name, value in workload.model.state_dict().items())


def test_all_methods_start_from_the_same_weights_and_stay_there(tmp_path: Path) -> None:
    own = {'type': 'SAMOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    with prepared(toy(tmp_path)):
        workload = load_workload(toy(tmp_path), batch_size=4)
        assert len(workload.batches) == 4
        candidates = [workload.candidate(name, own) for name in ('one', 'other')]
        measure_rounds([candidates], workload.batches, 2, 1, step_seconds)
    for candidate in candidates:
        assert candidate.model is not workload.model
        for parameter, start in zip(candidate.model.parameters(), workload.model.parameters(), strict=True):
            assert torch.equal(parameter, start)
            assert parameter.data_ptr() != start.data_ptr()


def test_the_ids_of_an_indexed_data_set_are_no_argument_of_the_model(tmp_path: Path) -> None:
    cfg = toy(tmp_path)
    cfg.train_dataloader.dataset = {'type': 'IndexedDataset', 'dataset': cfg.train_dataloader.dataset}
    own = {'rho': 0.05, 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    settings = {name: {'type': f'{name}OptimWrapper', **own} for name in ('SAM', 'AUSAM')}
    settings |= {'base': {**own, 'type': 'OptimWrapper'}, BY_HAND: settings['SAM']}
    del settings['base']['rho']
    with prepared(cfg):
        workload = load_workload(cfg, batch_size=4)
        assert 'sample_key' in workload.batches[0]
        times = workload.measure(settings, 1, 1, step_seconds, passes_only=True)
    assert len(times) == 6


class Diary:
    """Notes who steps on what."""

    def __init__(self, name: str, notes: list[tuple[str, int]], loss: float = 1.0) -> None:
        self.name, self.notes, self.loss = name, notes, loss

    def train_step(self, batch: int, optim_wrapper: None) -> dict[str, Any]:
        self.notes.append((self.name, batch))
        return {'loss': torch.tensor(self.loss)}


def test_rounds_are_interleaved_and_rotated() -> None:
    notes: list[tuple[str, int]] = []
    groups = [[Candidate(name, Diary(name, notes), None)] for name in 'abc']
    times = measure_rounds(groups, [7, 8], 4, 1, step_seconds)
    assert ' '.join(f'{name}{batch}' for name, batch in notes) == 'a7 b7 c7 a8 b8 c8 b7 c7 a7 c8 a8 b8 a7 b7 c7'
    assert [len(seconds) for seconds in times.values()] == [4, 4, 4]


def test_the_smallest_numbers_count_as_zero_in_steps_alone(tmp_path: Path) -> None:
    def product(*_: Any) -> float:
        return float(torch.tensor(1e-30) * torch.tensor(1e-10))

    with prepared(toy(tmp_path)):
        workload = load_workload(toy(tmp_path), batch_size=4)
        assert product() > 0, 'packages are imported here, which warn if there are no such numbers'
        found = workload.measure(
            {'base': {'type': 'OptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}}}, 1, 1, product
        )
    assert found == {'base': [0.0]}
    assert product() > 0


@pytest.mark.parametrize('loss', [float('nan'), float('-inf')])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(UsageError, match='a: the loss at the initial weights is'):
        measure_rounds([[Candidate('a', Diary('a', [], loss), None)]], [0], 1, 1, step_seconds)


def test_a_method_that_the_model_does_not_suit_is_refused(tmp_path: Path) -> None:
    (batch,) = batches(1, 4)
    del batch['sample_idx']
    own = {'type': 'AUSAMOptimWrapper', 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    with prepared(toy(tmp_path)), pytest.raises(UsageError, match='leave ausam out of --methods'):
        Workload(make(), [batch]).measure({'ausam': own}, 1, 1, step_seconds)


@pytest.mark.usefixtures('one_thread')
@pytest.mark.slow
def test_a_quantized_model_is_compared_with_its_float_model(
    tiny: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / 'w4a4.py', tmp_path / 'table.json'
    fragment = ROOT / 'configs' / '_base_' / 'quantization' / 'w4a4.py'
    config.write_text(f"_base_ = ['{tiny}', '{fragment}']\n")
    options = ['--rounds', '2', '--warmup', '1', '--threads', '1', '--out', str(out)]
    tool.main([str(config), '--methods', 'base', 'ausam', *options])
    (figures,) = json.loads(out.read_text())['tables']
    assert [row['label'] for row in figures['rows']] == ['float', 'base', 'ausam']
    assert figures['rows'][0]['limit'] is None
    assert figures['rows'][0]['distance_percent'] is None
    times = {method['method']: method['seconds'] for method in figures['methods']}
    pairs = [a / b for a, b in zip(times['base'], times['float'], strict=True)]
    assert f'base, quantized over float: {sum(pairs) / 2:.2f} (' in capsys.readouterr().out


@pytest.mark.slow
def test_the_quantized_workload_has_the_float_models_weights(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / 'w4a4.py'
    fragment = ROOT / 'configs' / '_base_' / 'quantization' / 'w4a4.py'
    config.write_text(
        f"_base_ = ['{tiny}', '{fragment}']\nsharp_quantization = dict(policy=dict(fold_batchnorm=False))\n"
    )
    cfg = Config.fromfile(config)
    with prepared(cfg):
        workload = load_workload(cfg, batch_size=5)
    assert workload.float_model is not None
    weights = dict(workload.model.named_parameters())
    for name, parameter in workload.float_model.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert any('tensor_quant' in name for name in weights)
    assert not any('tensor_quant' in name for name, _ in workload.float_model.named_parameters())


# -------------------------------------------------------------------- the command line
@pytest.mark.slow
@pytest.mark.usefixtures('one_thread')
def test_the_tool_prints_and_writes_all_rows(
    tiny: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'new' / 'table.json'
    options = ['--rounds', '2', '--warmup', '1', '--threads', '1', '--out', str(out)]
    tool.main([str(tiny), '--methods', 'sam', 'esam-history', *options])
    printed = capsys.readouterr().out
    assert '--rounds 2 becomes 10' in printed
    written = json.loads(out.read_text())
    (figures,) = written['tables']
    labels = [row['label'] for row in figures['rows']]
    assert labels == ['base', 'sam', 'esam-history, most steps', 'esam-history, cycle of 10']
    lines = printed.splitlines()
    for row in figures['rows']:
        (line,) = (line for line in lines if line.startswith(f'{row["label"]}  ') and ' to ' in line)
        assert f'{row["ratio"]["median"]:.3f}' in line
        assert f'{row["limit"]:.3f}' in line
        assert row['peak_bytes'] > 0
    assert (figures['batch_size'], figures['rounds'], written['threads'], written['amp']) == (5, 10, 1, None)
    for method in figures['methods']:
        assert len(method['seconds']) == 10
        assert min(method['seconds']) > 0
        assert sum(method['phase_seconds'].values()) > 0
        (line,) = (line for line in lines if line.split()[0:1] == [method['method']] and ' to ' not in line)
        assert sum(map(float, line.split()[1:])) == pytest.approx(100, abs=1)
    assert [method['optim_wrapper']['type'] for method in figures['methods']][:2] == ['OptimWrapper', 'SAMOptimWrapper']


@pytest.mark.usefixtures('one_thread')
@pytest.mark.slow
def test_several_batch_sizes_under_autocast_beside_sam_by_hand(tiny: Path, tmp_path: Path, tool: ModuleType) -> None:
    options = ['--batch-size', '3', '2', '3', '--amp', '--peers', '--rounds', '1', '--warmup', '1', '--threads', '1']
    out = tmp_path / 'table.json'
    tool.main([str(tiny), '--methods', 'sam', *options, '--out', str(out)])
    figures = json.loads(out.read_text())
    assert (figures['amp'], figures['keeps_freed_memory']) == ('bfloat16', False)
    assert [table['batch_size'] for table in figures['tables']] == [3, 2]
    for table in figures['tables']:
        assert [(row['label'], row['limit']) for row in table['rows']] == [('base', 1), ('sam', 2), ('sam by hand', 2)]
        assert all(method['optim_wrapper']['dtype'] == 'bfloat16' for method in table['methods'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give one of a CONFIG, --parameters COUNT and --host'),
        (['--parameters', '1k', '--host'], 'give one of a CONFIG'),
        (['sam.py', '--host'], 'give one of a CONFIG'),
        (['--parameters', '1k', '1.5'], '--parameters 1.5: it must be a whole number'),
        (['nowhere.py'], "no config file 'nowhere.py'"),
        (['sam.py', '--methods', 'sgd'], '--methods sgd: there are base, '),
        (['sam.py', '--methods', 'esma'], "did you mean 'esam'"),
        (['sam.py', '--methods', 'esam-histroy'], "selection='histroy' is not allowed"),
        (['sam.py', '--methods', 'ausam-1.5'], 'sampling_ratio=1.5 is not allowed'),
        (['sam.py', '--rounds', '0'], '--rounds 0: it must be at least 1'),
        (['sam.py', '--warmup', '0'], '--warmup 0: it must be at least 1'),
        (['sam.py', '--batch-size', '2', '0'], '--batch-size 0: it must be at least 1'),
        (['sam.py', '--amp', 'int8'], "invalid choice: 'int8'"),
        (['sam.py', '--amp', 'float16'], 'give --amp bfloat16'),
        (['sam.py', '--cfg-options', 'optim_wrapper.dtype=float16'], 'only available training on gpu'),
        (
            ['sam.py', '--peers', '--cfg-options', 'optim_wrapper.adaptive=True'],
            'SAM by hand knows no',
        ),
        (['sam.py', '--batch-size', '12'], '--batch-size 12: the training data has 11 samples only'),
        (['sam.py', '--threads', 'x'], "invalid int value: 'x'"),
        (['sam.py', '--out', 'table.txt'], 'must end in .json'),
        (['sam.py', '--cfg-options', 'optim_wrapper.rhoo=1'], 'rhoo'),
        (['sam.py', '--cfg-options', 'optim_wrapper.rho=-1'], 'rho=-1 is not allowed'),
        (['sam.py', '--cfg-options', 'train_dataloader.dataset.ann_file=no.json'], 'no.json'),
        (['sam.py', '--cfg-options', 'train_dataloader=None'], 'no train_dataloader'),
        (['--parameters', '10G'], '--parameters 10G: it must be a whole number of at least 1'),
        (['--parameters', '0'], '--parameters 0: it must be a whole number of at least 1'),
        (['--parameters', '0.0001k'], '--parameters 0.0001k: it must be a whole number of at least 1'),
    ],
)
def test_what_is_wrong_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tiny.parent)
    with pytest.raises(UsageError) as caught:
        tool.main(arguments)
    assert message in str(caught.value)


# -------------------------------------------------------------------- parts of a step
@pytest.mark.parametrize(('text', 'number'), [('1B', 10**9), ('10M', 10_000_000), ('1.5k', 1500), ('20000', 20_000)])
def test_counts(tool: ModuleType, text: str, number: int) -> None:
    assert tool.parse_count(text) == number


def test_perturbation_and_restoration_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main(['--parameters', '1k', '20k', '--rounds', '2', '--out', str(tmp_path / 'parameters.json')])
    costs = json.loads((tmp_path / 'parameters.json').read_text())['parameters']
    assert [(cost['parameters'], cost['tensors']) for cost in costs] == [(1000, 1), (20_000, 7)]
    printed = capsys.readouterr().out
    for cost in costs:
        assert cost['share_of_copy'] > 0
        assert all(cost[rate]['low'] > 0 for rate in ('copy_rate', 'climb_rate', 'restore_rate'))
        assert f'{100 * cost["share_of_copy"]:.0f} %' in printed
    assert '8 numbers read or written by the perturbation' in printed


def test_the_hosts_own_time() -> None:
    """Whole cycles of steps on the small model, each method's cost by its wrapper's own defaults."""
    rows = measure_host(parse_methods(METHODS), 3, 1)
    assert [row.label for row in rows if 'cycle' not in row.label] == [
        *('base', 'sam', 'esam', 'esam-history, most steps', 'ausam', 'ausam-0.5')
    ]
    assert sum(parameter.numel() for parameter in SmallModel().parameters()) == 3164
    costs = {row.label: row.theoretical for row in rows}
    assert (costs['sam'], costs['ausam'], costs['ausam-0.5']) == (2.0, 1.0, 1.0)
    assert costs['esam-history, cycle of 10'] == pytest.approx((2 + 0.6 + 1.5 + 0.1) / 3)
    assert next(row.steps for row in rows if row.label == 'base') == 10, 'a whole cycle'
    assert all(row.seconds.median > 0 for row in rows)


@pytest.mark.usefixtures('one_thread')
def test_the_hosts_time_by_the_tool(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ['--rounds', '2', '--methods', 'sam', '--peers', '--floors', '--out', str(tmp_path / 'host.json')]
    tool.main(['--host', *options])
    assert 'its ratio to the base optimizer' in capsys.readouterr().out
    found = json.loads((tmp_path / 'host.json').read_text())
    assert [row['label'] for row in found['host']] == ['base', 'sam', 'sam, passes alone', 'sam by hand']
    assert (found['host'][1]['limit'], found['threads']) == (2.0, 1)
    assert found['host'][1]['ratio']['median'] > 0


def test_what_a_whole_training_costs_is_below_the_table() -> None:
    costs = {name: theoretical_cost(own, 32) for name, own in parse_methods(['sam', 'ausam', 'ausam-uniform']).items()}
    assert run_costs(costs) == 'ausam: 1.00 + 1.00 / epochs over a training: the first epoch costs 2.00'
