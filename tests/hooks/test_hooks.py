"""SharpnessHook: what it logs, when, and that it costs no extra pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.runner import Runner

from tests.toys import KEYS, toy_config


def train(work_dir: Path, **changes: Any) -> Runner:
    runner = Runner.from_cfg(toy_config(work_dir, **changes))
    runner.train()
    return runner


@pytest.fixture
def entries(tmp_path: Path) -> tuple[Runner, list[dict[str, float]]]:
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    runner = train(
        tmp_path / 'run',
        visualizer=dict(type='Visualizer', vis_backends=backends),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=2, ignore_last=False)),
    )
    (log,) = (tmp_path / 'run').rglob('vis_data/scalars.json')
    return runner, [json.loads(line) for line in log.read_text().splitlines()]


def test_logged_at_the_loggers_interval_and_at_the_epochs_end(entries: tuple[Runner, list[dict[str, float]]]) -> None:
    runner, logged = entries
    assert [entry['step'] for entry in logged] == [2, 4, 5, 7, 9, 10]
    assert all(entry.keys() >= KEYS for entry in logged)
    history = runner.message_hub.get_scalar('train/sharpness/sharpness')
    assert len(history.data[0]) == 6


def test_values_belong_to_the_logged_iteration(entries: tuple[Runner, list[dict[str, float]]]) -> None:
    runner, logged = entries
    ours = [{key.removeprefix('sharpness/'): value for key, value in entry.items()} for entry in logged]
    for entry in ours:
        assert entry['sharpness'] == pytest.approx(entry['L_w_e'] - entry['L_w'])
        assert entry['sharpness'] > 0
        assert entry['g_norm'] > 0
        assert 0 < entry['pass2_share'] < 1
    last = runner.optim_wrapper.last_step
    assert ours[-1]['L_w'] == last.loss.item()
    assert ours[-1]['L_w_e'] == last.perturbed_loss.item()
    assert ours[-1]['g_norm'] == last.grad_norm.item()


def test_tensorboard_has_the_same_values(entries: tuple[Runner, list[dict[str, float]]], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, logged = entries
    (events,) = (tmp_path / 'run').rglob('events.out.tfevents.*')
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    for key in KEYS:
        values = [(event.step, event.value) for event in accumulator.Scalars(key)]
        assert values == [(e['step'], pytest.approx(e[key], rel=1e-5)) for e in logged]


def test_no_extra_pass(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(tmp_path / 'run'))
    calls: list[int] = []
    runner.model.register_forward_hook(lambda *_: calls.append(1))
    runner.train()
    assert len(calls) == 2 * 10


def test_an_interval_of_its_own(tmp_path: Path) -> None:
    runner = train(tmp_path / 'run', custom_hooks=[dict(type='SharpnessHook', interval=5)])
    assert len(runner.message_hub.get_scalar('train/sharpness/sharpness').data[0]) == 2


def test_steps_that_are_not_logged_are_not_timed(tmp_path: Path) -> None:
    runner = train(
        tmp_path / 'run', train_cfg=dict(by_epoch=False, max_iters=9), custom_hooks=[dict(type='SharpnessHook')]
    )
    assert runner.optim_wrapper.last_step.timer is None


def test_a_plain_wrapper_is_named(tmp_path: Path) -> None:
    plain = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    with pytest.raises(ValueError, match=r'SharpnessHook needs .*uses OptimWrapper(.|\n)*custom_hooks'):
        train(tmp_path / 'run', optim_wrapper=plain)
