"""The benchmark's parts: autocast, baselines, phases, memory, perturbing and the chart. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mm_sharp import SAMOptimWrapper
from mm_sharp.analysis.benchmark import steps
from mm_sharp.analysis.benchmark.candidates import (
    BY_HAND,
    Candidate,
    HandWrittenSAM,
    check_by_hand,
    parse_methods,
    wrapper_settings,
)  # fmt: skip
from mm_sharp.analysis.benchmark.steps import TensorsAlive, peak_memory, phase_seconds
from mm_sharp.analysis.benchmark.table import NAMES, Quartiles, phase_table, typical
from mm_sharp.analysis.benchmark.workload import Ready, Workload
from mm_sharp.analysis.prepare import prepared
from mm_sharp.errors import UsageError
from mm_sharp.step import timing as step_record
from mm_sharp.step.method import Cost
from mm_sharp.step.timing import StepTimer
from tests.conftest import ROOT
from tests.toys import ToyNet, batches, make, toy_config

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def _in_scope() -> Iterator[None]:
    with prepared(Config()):
        yield


def without_preprocessor(model: ToyNet) -> ToyNet:
    model.data_preprocessor = Ready()
    return model


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# -------------------------------------------------------------------- the base optimizer under autocast
@pytest.mark.parametrize('name', ['base', BY_HAND])
def test_the_base_optimizer_under_autocast(name: str) -> None:
    model = without_preprocessor(make())
    own = {'type': 'OptimWrapper', 'dtype': 'bfloat16', 'optimizer': {'type': 'SGD', 'lr': 0.05}}
    candidate = Workload(model, []).candidate(name, own)
    seen: list[torch.dtype] = []
    candidate.model.head.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    (batch,) = batches(1)
    log = candidate.step(batch)
    assert {*seen} == {torch.bfloat16}
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.parse_losses(model(**batch))[0]
    assert log['loss'].item() == loss.item()
    assert 'forward' not in vars(model)


def test_precision_holds_for_the_base_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {'type': 'SAMOptimWrapper', 'dtype': 'bfloat16', 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    cfg = Config(toy_config(tmp_path, optim_wrapper=half))

    def found(name: str, amp: str | None = None) -> tuple[str, str | None]:
        settings = wrapper_settings(cfg, parse_methods([name])[name], amp)
        return settings['type'], settings.get('dtype')

    assert found('base') == ('OptimWrapper', 'bfloat16')
    assert found('sam', 'float16') == ('SAMOptimWrapper', 'float16')
    monkeypatch.setattr('mm_sharp.analysis.benchmark.candidates.check_wrappers', lambda cfg: None)
    assert found('base', 'float16') == ('AmpOptimWrapper', 'float16')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    del cfg.optim_wrapper['dtype']
    assert found('base') == ('AmpOptimWrapper', 'float16')
    assert found('sam') == ('SAMOptimWrapper', 'float16')
    assert found('sam', 'bfloat16') == ('SAMOptimWrapper', 'bfloat16')
    cfg.optim_wrapper.type = 'OptimWrapper'
    assert found('base') == ('OptimWrapper', None)


# -------------------------------------------------------------------- SAM by hand
def test_sam_by_hand_is_sam_but_for_batchnorms_statistics() -> None:
    ours, theirs = (without_preprocessor(make()) for _ in range(2))
    wrapper = SAMOptimWrapper(sgd(ours), rho=0.05)
    baseline = HandWrittenSAM(BY_HAND, theirs, sgd(theirs), 0.05)
    for batch in batches(3):
        log = baseline.step(batch)
        own = ours.train_step(batch, wrapper)
        assert log['loss'].item() == pytest.approx(own['loss'].item(), rel=1e-5)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert (int(ours.norm.num_batches_tracked), int(theirs.norm.num_batches_tracked)) == (3, 6)


def test_sam_by_hand_goes_back_to_its_copies() -> None:
    model = without_preprocessor(make())
    before = [parameter.clone() for parameter in model.parameters()]
    steps: list[torch.Tensor] = []

    def mark(phase: str) -> None:
        if phase == 'perturb':
            steps.extend((now - then).flatten() for now, then in zip(model.parameters(), before, strict=True))

    HandWrittenSAM(BY_HAND, model, sgd(model, lr=0.0), 0.5).step(batches(1)[0], mark)
    assert torch.cat(steps).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'dtype': 'float16'}, "dtype='float16': .*optim_wrapper.dtype=bfloat16"),
        ({'clip_grad': {'max_norm': 1}}, 'clip_grad=.*optim_wrapper.clip_grad=None'),
        ({'adaptive': True}, 'adaptive=True.*optim_wrapper.adaptive=False'),
    ],
)
def test_what_sam_by_hand_does_not_know_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_by_hand(settings)


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
    cfg, model = Config(toy_config(tmp_path)), without_preprocessor(make())
    names = ['base', 'sam', 'esam', 'esam-history', 'ausam']
    settings = {name: wrapper_settings(cfg, parse_methods([name])[name]) for name in names}
    settings[BY_HAND] = settings['sam']
    found = Workload(model, batches(2)).measure(settings, 2, 1, phase_seconds)
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


def test_a_candidate_is_as_before_after_a_timed_step() -> None:
    model = without_preprocessor(make())
    for wrapper in (OptimWrapper(sgd(model)), SAMOptimWrapper(sgd(model))):
        candidate = Candidate('it', model, wrapper)
        assert candidate.timed_step(batches(1)[0]).seconds()['pass1'] > 0
        assert 'backward' not in vars(wrapper)
        assert not getattr(wrapper, 'record_timing', False)


def test_typical_phases_are_those_between_refreshes() -> None:
    def step(number: float) -> dict[str, float]:
        return dict.fromkeys(NAMES, number)

    found = typical([step(5), step(100), step(7)], Cost(1.4, 1.5, 3), done=2)
    assert found == step(6)
    assert typical([step(1), step(2), step(9)], None, done=2) == step(2)
    lines = phase_table({'sam': {**step(1), 'pass1': 94.0}}).splitlines()
    assert lines[1].split() == ['sam', '94.0', *['1.0'] * 6]


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


@pytest.mark.slow
def test_freed_memory_is_kept() -> None:
    """In a process of its own: pages that are touched again are there."""
    code = """
import resource, sys, torch
from mm_sharp.analysis.benchmark.steps import keep_freed_memory
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


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'matrices'), [(OptimWrapper, 2), (SAMOptimWrapper, 3)])
def test_peak_memory_of_a_step(kind: type[OptimWrapper], matrices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and gradient; SAM's copy of the weights besides."""

    def candidate() -> Candidate:
        model = Wide()
        return Candidate('it', model, kind(torch.optim.SGD(model.parameters(), lr=0.1)))

    peak = peak_memory(candidate, torch.ones(500), steps=2)
    assert peak is not None
    assert matrices <= peak / (4 * 500 * 500) < matrices + 0.1
    monkeypatch.setattr('mm_sharp.analysis.benchmark.steps.get_device', lambda: 'mps')
    assert peak_memory(candidate, torch.ones(500), steps=1) is None


# -------------------------------------------------------------------- perturbation and restoration
def test_the_tensors_are_those_of_a_resnet_50() -> None:
    shapes = steps.resnet_shapes(25_557_032)
    assert (len(shapes), shapes[-1], shapes[-2]) == (161, (1000,), (1000, 2048))
    for count in (1, 9408, 30_000_000):
        assert sum(torch.Size(shape).numel() for shape in steps.resnet_shapes(count)) == count


def test_perturbation_and_restoration_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def seconds_of(call: Callable[[], object]) -> float:
        calls.append(getattr(call, '__name__', 'copy'))
        call()
        return {'copy': 1.0, 'perturb': 4.0, 'restore': 2.0}[calls[-1]]

    monkeypatch.setattr(steps, 'seconds_of', seconds_of)
    cost = steps.measure_perturbing(10_000, rounds=2)
    assert calls == ['copy', 'perturb', 'restore'] * 3
    assert (cost['parameters'], cost['tensors']) == (10_000, 4)
    assert cost['climb_rate'] == Quartiles(*[4 * 8 * 10_000 / 4] * 3)
    assert cost['restore_rate'] == Quartiles(*[4 * 2 * 10_000 / 2] * 3)
    copied = cost['copy_rate'].median
    assert copied == pytest.approx(4 * 2 * 10_000, rel=0.05)  # what lies between the tensors too
    assert cost['share_of_copy'] == pytest.approx(40 * 10_000 / 6 / copied)
    assert f'{100 * cost["share_of_copy"]:.0f} %' in steps.perturbing_table([cost])
