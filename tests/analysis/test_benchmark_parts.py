"""The benchmark's parts: autocast, peers, phases, memory, climbing and the chart. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

from mm_sharp import SAMOptimWrapper
from mm_sharp.analysis import benchmark
from mm_sharp.analysis.benchmark import Candidate, Quartiles, Row, StepLimit, Table, climbing
from mm_sharp.analysis.benchmark.autocast import AutocastOptimWrapper
from mm_sharp.analysis.benchmark.baselines import BY_HAND, LIBRARY, HandWrittenSAM, make_peer
from mm_sharp.analysis.benchmark.memory import TensorsAlive, peak_memory
from mm_sharp.analysis.benchmark.phases import NAMES, typical
from mm_sharp.analysis.benchmark.workload import Ready, prepared
from mm_sharp.errors import UsageError
from mm_sharp.step import timing as step_record
from mm_sharp.step.timing import StepTimer
from tests.conftest import ROOT
from tests.toys import ToyNet, batches, make, same_state, toy_config

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def _in_scope() -> Iterator[None]:
    with prepared('mmengine'):
        yield


def without_preprocessor(model: ToyNet) -> ToyNet:
    model.data_preprocessor = Ready()
    return model


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# -------------------------------------------------------------------- the base optimizer under autocast
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('clip', [None, {'max_norm': 0.01}])
def test_the_autocast_base_is_a_step_written_by_hand(dtype: str, clip: dict[str, float] | None) -> None:
    ours, theirs = make(), make()
    settings = {'type': 'AutocastOptimWrapper', 'dtype': dtype, 'loss_scale': 256.0, 'clip_grad': clip}
    wrapper = build_optim_wrapper(ours, {**settings, 'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}})
    optimizer = sgd(theirs)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0, enabled=dtype == 'float16')
    seen: list[torch.dtype] = []
    ours.head.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    for batch in batches(3):
        ours.train_step(batch, wrapper)
        with torch.autocast('cpu', getattr(torch, dtype)):
            loss = theirs.parse_losses(theirs(**batch))[0]
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(theirs.parameters(), **clip)
        scaler.step(optimizer)
        scaler.update(256.0)
        optimizer.zero_grad()
    assert seen == [getattr(torch, dtype)] * 3
    assert same_state(ours, theirs)
    assert not isinstance(wrapper, SAMOptimWrapper)


def test_precision_holds_for_the_base_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {'type': 'SAMOptimWrapper', 'dtype': 'bfloat16', 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    cfg, base = Config(toy_config(tmp_path, optim_wrapper=half)), benchmark.METHODS['base']
    bfloat16 = 'bfloat16', {'enabled': False}

    def found(name: str, amp: str | None = None) -> tuple[str, ...]:
        settings = benchmark.wrapper_settings(cfg, benchmark.METHODS[name], amp)
        return settings['type'], settings['dtype'], settings.get('loss_scale')

    assert found('base') == ('AutocastOptimWrapper', *bfloat16)
    assert found('base', 'float16') == ('AutocastOptimWrapper', 'float16', 'dynamic')
    assert found('sam', 'float16') == ('SAMOptimWrapper', 'float16', 'dynamic')
    monkeypatch.setattr('mm_sharp.analysis.benchmark.methods.get_device', lambda: 'cuda')
    monkeypatch.setattr('mm_sharp.analysis.benchmark.methods.check_wrappers', lambda cfg: None)
    assert found('base') == ('AmpOptimWrapper', *bfloat16)
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    del cfg.optim_wrapper['dtype']
    assert found('base') == ('AmpOptimWrapper', 'float16', 'dynamic')
    assert found('sam')[1:] == ('float16', 'dynamic')
    assert found('sam', 'bfloat16')[1] == 'bfloat16'
    cfg.optim_wrapper.type = 'OptimWrapper'
    assert 'dtype' not in benchmark.wrapper_settings(cfg, base)
    assert AutocastOptimWrapper.__mro__[1] is OptimWrapper


# -------------------------------------------------------------------- peers
def test_sam_by_hand_is_sam_but_for_batchnorms_statistics() -> None:
    ours, theirs = (without_preprocessor(make()) for _ in range(2))
    wrapper = SAMOptimWrapper(sgd(ours), rho=0.05)
    peer = make_peer(BY_HAND, theirs, sgd(theirs), {'rho': 0.05})
    for batch in batches(3):
        log = peer.step(batch)
        own = ours.train_step(batch, wrapper)
        assert log['loss'].item() == pytest.approx(own['loss'].item(), rel=1e-5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert (int(ours.norm.num_batches_tracked), int(theirs.norm.num_batches_tracked)) == (3, 6)


def test_sam_by_hand_goes_back_to_its_copies() -> None:
    model = make()
    sam = HandWrittenSAM(sgd(model, lr=0.0), rho=0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    model(**batches(1)[0])['loss_square'].backward()
    sam.first_step(zero_grad=True)
    steps = [now - then for now, then in zip(model.parameters(), before, strict=True)]
    model(**batches(1)[0])['loss_square'].backward()
    sam.second_step(zero_grad=True)
    assert torch.cat([step.flatten() for step in steps]).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


class Fake(HandWrittenSAM):
    """In the place of the other package's class, with its signature."""

    def __init__(self, groups: Any, base: type[torch.optim.Optimizer], rho: float) -> None:
        super().__init__(base(groups, lr=1.0), rho)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pytorch_optimizer."""
    module: Any = ModuleType('pytorch_optimizer')
    module.SAM, module.__spec__ = Fake, ModuleSpec('pytorch_optimizer', None)
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', module)


@pytest.mark.usefixtures('library')
def test_the_other_packages_sam_gets_the_same_groups() -> None:
    model = without_preprocessor(make())
    optimizer = torch.optim.SGD([{'params': [p], 'lr': 0.01 * i} for i, p in enumerate(model.parameters())], lr=1.0)
    peer = make_peer(LIBRARY, model, optimizer, {'rho': 0.2})
    assert isinstance(peer.sam, Fake)
    assert peer.sam.rho == 0.2
    assert [group['lr'] for group in peer.sam.optimizer.param_groups] == [0.01 * i for i in range(6)]
    assert benchmark.check_peers({}) == ([BY_HAND, LIBRARY], None)


def test_the_real_other_package() -> None:
    pytest.importorskip('pytorch_optimizer')
    ours, theirs = (without_preprocessor(make(norm=False)) for _ in range(2))
    wrapper = SAMOptimWrapper(sgd(ours), rho=0.05)
    peer = make_peer(LIBRARY, theirs, sgd(theirs), {'rho': 0.05})
    for batch in batches(3):
        peer.step(batch)
        ours.train_step(batch, wrapper)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)  # type: ignore[arg-type]
    peers, missing = benchmark.check_peers({'rho': 0.1, 'dtype': 'bfloat16'})
    assert peers == [BY_HAND]
    assert 'pip install pytorch_optimizer' in str(missing)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'dtype': 'float16'}, "dtype='float16': .*optim_wrapper.dtype=bfloat16"),
        ({'clip_grad': {'max_norm': 1}}, 'clip_grad=.*optim_wrapper.clip_grad=None'),
        ({'adaptive': True}, 'adaptive=True.*optim_wrapper.adaptive=False'),
    ],
)
def test_what_peers_do_not_know_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        benchmark.check_peers(settings)


def test_peers_run_under_autocast() -> None:
    model = without_preprocessor(make())
    peer = make_peer(BY_HAND, model, sgd(model), {'dtype': 'bfloat16'})
    seen: list[torch.dtype] = []
    model.head.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    peer.step(batches(1)[0])
    assert seen == [torch.bfloat16] * 2


# -------------------------------------------------------------------- phases
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The timer's clock, which stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(step_record.time, 'perf_counter', lambda: now[0])

    def move(seconds: float, fails: bool = False) -> None:
        now[0] += seconds
        if fails:
            raise RuntimeError

    return move


def test_asides_are_taken_out_of_their_phases(clock: Callable[..., None]) -> None:
    timer = StepTimer(CPU)
    timer.mark('start')
    clock(1)
    with timer.exclude('recording'):
        clock(2)
        with timer.exclude('host'):
            clock(4)
    clock(8)
    timer.mark('pass1')
    with pytest.raises(RuntimeError), timer.exclude('host'):
        clock(16, fails=True)
    clock(32)
    timer.mark('perturb')
    clock(64)
    timer.mark('step')
    assert timer.seconds() == {
        'pass1': 9, 'perturb': 32, 'pass2': 0, 'restore': 0, 'step': 64, 'recording': 6, 'host': 16,
    }  # fmt: skip


def test_a_step_that_is_not_over_has_no_times() -> None:
    timer = StepTimer(CPU)
    timer.mark('start')
    with pytest.raises(RuntimeError, match=r"no marks \['step'\]"):
        timer.seconds()


def test_phases_of_each_method(tmp_path: Path) -> None:
    cfg = Config(toy_config(tmp_path))
    subject = benchmark.load_subject(cfg, batch_size=8)
    names = ['base', 'sam', 'esam', 'esam-history', 'ausam']
    settings = {name: benchmark.wrapper_settings(cfg, benchmark.METHODS[name]) for name in names}
    settings[BY_HAND] = settings['sam']
    found = subject.measure_phases(settings, rounds=2)
    used = {name: {phase for step in steps for phase in NAMES if step[phase] > 0} for name, steps in found.items()}
    # SAM records nothing: that takes no time but the clock's.
    used['sam'].discard('recording')
    assert min(step['recording'] for step in found['ausam']) > max(step['recording'] for step in found['sam'])
    passes = {'pass1', 'perturb', 'pass2', 'step', 'host'}
    assert used == {
        'base': {'pass1', 'step', 'host'}, 'sam': {*passes, 'restore'}, 'esam': {*NAMES}, 'esam-history': {*NAMES},
        'ausam': {*NAMES}, BY_HAND: passes,
    }  # fmt: skip
    assert all(step.keys() == set(NAMES) for steps in found.values() for step in steps)
    assert all(step[phase] >= 0 for steps in found.values() for step in steps for phase in NAMES)


def test_a_contestant_is_as_before_after_a_timed_step() -> None:
    model = without_preprocessor(make())
    for wrapper in (OptimWrapper(sgd(model)), SAMOptimWrapper(sgd(model))):
        candidate = Candidate('it', model, wrapper)
        assert candidate.timed_step(batches(1)[0], CPU).seconds()['pass1'] > 0
        assert 'backward' not in vars(wrapper)
        assert not getattr(wrapper, 'record_timing', False)


def test_typical_phases_are_those_between_refreshes() -> None:
    def step(number: float) -> dict[str, float]:
        return dict.fromkeys(NAMES, number)

    found = {'sam': [step(1), step(2), step(9)], 'esam-history': [step(5), step(100), step(7)], 'float': [step(3)] * 3}
    limits = {'sam': StepLimit(2, 2), 'esam-history': StepLimit(1.4, 1.5, 3), 'float': None}
    phases = typical(found, limits, done=2)
    assert {name: seconds['pass1'] for name, seconds in phases.items()} == {'sam': 2, 'esam-history': 6, 'float': 3}
    table = benchmark.phase_table({'sam': {**step(1), 'pass1': 94.0}})
    assert table.splitlines()[1].split() == ['sam', '94.0', *['1.0'] * 6]


# -------------------------------------------------------------------- memory
def test_tensors_alive_are_counted_once() -> None:
    given = torch.zeros(1000)
    ignored = torch.zeros(10_000)
    with TensorsAlive(without=[ignored]) as alive:
        double = given * 2 + ignored[:1000]
        assert alive.now == 8000
        view = double[::2]
        double.add_(1)
        assert (alive.now, alive.peak) == (8000, 12_000)  # the product was there beside the sum
        del double
        assert alive.now == 8000
        del view
        assert alive.now == 4000


def test_freed_memory_is_kept() -> None:
    """In a process of its own: pages that are touched again are there."""
    code = """
import resource, sys, torch
from mm_sharp.analysis.benchmark.memory import keep_freed_memory
if not keep_freed_memory():
    sys.exit('no glibc')
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(2_000_000) for _ in range(10)]
    del several
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    if run.stderr.strip() == 'no glibc':
        pytest.skip('no glibc here')
    first, _, third = map(int, run.stdout.split())
    # One of the ten may lie where none was before.
    assert first > 5 * (third + 1), run.stderr


class Wide(nn.Module):
    """All of its memory is one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(500, 500))

    def train_step(self, batch: Tensor, optim_wrapper: Any) -> dict[str, Tensor]:
        with optim_wrapper.optim_context(self):
            loss = self(batch)
        optim_wrapper.update_params(loss)
        return {}

    def forward(self, batch: Tensor) -> Tensor:
        return (self.matrix @ batch).mean()


@pytest.mark.parametrize(('kind', 'matrices'), [(OptimWrapper, 2), (SAMOptimWrapper, 3)])
def test_peak_memory_of_a_step(kind: type[OptimWrapper], matrices: int) -> None:
    """Weights and gradient; SAM's copy of the weights besides."""

    def candidate() -> Candidate:
        model = Wide()
        return Candidate('it', model, kind(torch.optim.SGD(model.parameters(), lr=0.1)))

    peak = peak_memory(candidate, torch.ones(500), steps=2, device=CPU)
    assert peak is not None
    assert matrices <= peak / (4 * 500 * 500) < matrices + 0.1
    assert peak_memory(candidate, torch.ones(500), steps=1, device=torch.device('meta')) is None


# -------------------------------------------------------------------- climb and restoration
def test_the_tensors_are_those_of_a_resnet_50() -> None:
    shapes = climbing.resnet_shapes(25_557_032)
    assert (len(shapes), shapes[-1], shapes[-2]) == (161, (1000,), (1000, 2048))
    for count in (1, 9408, 30_000_000):
        assert sum(torch.Size(shape).numel() for shape in climbing.resnet_shapes(count)) == count


def test_climb_and_restoration_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def seconds_of(call: Callable[[], object], device: torch.device) -> float:
        calls.append(getattr(call, '__name__', 'copy'))
        call()
        return {'copy': 1.0, 'save_and_climb': 4.0, 'restore': 2.0}[calls[-1]]

    monkeypatch.setattr(climbing, 'seconds_of', seconds_of)
    cost = benchmark.measure_climb(10_000, rounds=2, device=CPU)
    assert calls == ['copy', 'save_and_climb', 'restore'] * 3
    assert (cost.parameters, cost.tensors) == (10_000, 4)
    assert cost.climb_rate == Quartiles(*[4 * 8 * 10_000 / 4] * 3)
    assert cost.restore_rate == Quartiles(*[4 * 2 * 10_000 / 2] * 3)
    assert cost.copy_rate.median == pytest.approx(4 * 2 * 10_000, rel=0.05)  # what lies between the tensors too
    assert cost.share == pytest.approx(40 * 10_000 / 6 / cost.copy_rate.median)
    assert f'{100 * cost.share:.0f} %' in benchmark.climb_table([cost])


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(climbing, 'free_memory', lambda device: 13_000_000_000)
    with pytest.raises(UsageError, match=r'1,000,000,000 weights.* take 12\.0 GB.* 13\.0 GB are free'):
        benchmark.measure_climb(1_000_000_000, rounds=1, device=CPU)


def test_free_memory_is_known_on_the_cpu_alone() -> None:
    assert 2**20 < (climbing.free_memory(CPU) or 0) < 2**50
    assert climbing.free_memory(torch.device('meta')) is None


# -------------------------------------------------------------------- the chart
def test_the_chart_shows_each_bar(tmp_path: Path) -> None:
    phases = {'base': dict.fromkeys(NAMES, 1.0), 'sam': dict.fromkeys(NAMES, 2.0)}
    times = {'base': [0.1, 0.1], 'sam': [0.2, 0.3]}
    rows = benchmark.compare(times, {'base': None, 'sam': StepLimit(2, 2)}, 8)
    tables = [Table(size, 2, rows, phases, {'base': {}, 'sam': {}}, times, {}) for size in (8, 16)]
    benchmark.draw_chart(tables, tmp_path / 'new' / 'chart.png', 'a title')
    picture = cv2.imread(str(tmp_path / 'new' / 'chart.png'))
    # Width of the bars in the first panel, by their colour: SAM's is 2.5 times as long as the base optimizer's.
    left = (picture[: picture.shape[0] // 2, : picture.shape[1] // 2] == (0xEE, 0xCC, 0x88)).all(2)
    lengths = sorted({int(count) for count in left.sum(1) if count > 100})
    assert lengths[-1] / lengths[0] == pytest.approx(2.5, abs=0.2)
    assert isinstance(rows[0], Row)
