"""2,000 steps through a Runner: memory stays flat, and nothing piles up."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mm_sharp.methods.per_sample import PerSampleOptimWrapper
from tests.reliability import Holds
from tests.toys import history_bytes, toy_config

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='reads the memory in use from /proc')
# The heap takes some hundred steps to find its size; from then on 1 % is 3 kB a step.
STEPS, SETTLED, SAMPLES = 2000, 500, 40
SGD = dict(type='SGD', lr=0.005, momentum=0.9)
METHODS: dict[str, dict[str, Any]] = {
    'sam': dict(type='SAMOptimWrapper', optimizer=SGD, accumulative_counts=2),
    'esam': dict(type='ESAMOptimWrapper', optimizer=SGD, dtype='float16'),
    'esam-history': dict(type='ESAMOptimWrapper', selection='history', refresh=3, optimizer=SGD),
    'ausam': dict(type='AUSAMOptimWrapper', reweight=True, optimizer=SGD, clip_grad=dict(max_norm=5.0)),
}


@HOOKS.register_module()
class Gauge(Hook):  # type: ignore[misc]
    """Measures a run when it has settled and at its end."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 in (SETTLED, STEPS):
            self.measured.append(measure(runner))


def measure(runner: Any) -> dict[str, Any]:
    wrapper, hub = runner.optim_wrapper, runner.message_hub
    gc.collect()
    history = wrapper.history if isinstance(wrapper, PerSampleOptimWrapper) else None
    return {
        'memory': resident(),
        'hooks': [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in runner.model.modules()],
        'runner hooks': len(runner.hooks),
        'message hub': (sorted(hub.log_scalars), sorted(hub.runtime_info)),
        'history': None if history is None else (len(history), history_bytes(history)),
        'tensors': sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


def resident() -> int:
    """Memory of this process, in bytes, without what earlier tests have left to the allocator."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n == 'ausam' else pytest.mark.thorough) for n in METHODS])
@pytest.mark.slow
def test_nothing_grows(tmp_path: Path, name: str, holds: Holds) -> None:
    config = toy_config(tmp_path / name, optim_wrapper=METHODS[name], custom_hooks=[dict(type='SharpnessHook')])
    config['train_dataloader']['dataset']['count'] = SAMPLES
    config['train_cfg'] = dict(by_epoch=True, max_epochs=STEPS // (SAMPLES // 4))
    config['default_hooks'] = dict(
        logger=dict(type='LoggerHook', interval=50),
        checkpoint=dict(type='CheckpointHook', interval=5, max_keep_ckpts=1),
    )
    runner = Runner.from_cfg(config)
    gauge = Gauge()
    runner.register_hook(gauge)
    runner.train()
    settled, end = gauge.measured
    growth = end['memory'] / settled['memory'] - 1
    assert growth < 0.01
    for quantity in ('hooks', 'runner hooks', 'message hub', 'history'):
        assert end[quantity] == settled[quantity], quantity
    assert end['tensors'] <= settled['tensors']  # fewer where an earlier test's are let go of
    if end['history'] is not None:
        seen = 0 if name == 'esam' else SAMPLES
        assert end['history'][0] == seen
    held = 'memory flat to 1 %; hooks, message hub and history as after 100 steps'
    holds('Long runs', f'{STEPS} steps', name, held, count=STEPS, unit='steps of long runs')
