"""SharpnessHook: what it logs, when, and that it costs no extra pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.toys import KEYS, toy_config


def train(work_dir: Path, **changes: Any) -> Runner:
    runner = Runner.from_cfg(toy_config(work_dir, **changes))
    runner.train()
    return runner


def entries_of(work_dir: Path) -> list[dict[str, float]]:
    logs = sorted(work_dir.rglob('vis_data/scalars.json'))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@pytest.fixture
def entries(tmp_path: Path) -> tuple[Runner, list[dict[str, float]]]:
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    runner = train(
        tmp_path / 'run',
        visualizer=dict(type='Visualizer', vis_backends=backends),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=2, ignore_last=False)),
    )
    return runner, entries_of(tmp_path / 'run')


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


@pytest.mark.slow
def test_steps_that_are_not_logged_are_not_timed(tmp_path: Path) -> None:
    runner = train(
        tmp_path / 'run', train_cfg=dict(by_epoch=False, max_iters=9), custom_hooks=[dict(type='SharpnessHook')]
    )
    assert runner.optim_wrapper.last_step.timer is None


SECOND = KEYS - {'sharpness/L_w'} | {'sharpness/rho_relative', 'sharpness/linearity'}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('settings', 'interval', 'expected'),
    [  # the iteration whose second pass each entry has, if there was one since the entry before
        (dict(type='SAMOptimWrapper', interval=3), 2, {2: 1, 4: 4, 6: None, 8: 7, 10: 10}),
        (dict(type='SAMOptimWrapper', interval=3), 3, {3: 1, 6: 4, 9: 7}),
        (dict(type='LookSAMOptimWrapper', k=5), 10, {5: 1, 10: 6}),
    ],
)
def test_steps_without_a_second_pass_show_the_last_one_that_had_it(
    settings: dict[str, Any], interval: int, expected: dict[int, int | None], tmp_path: Path
) -> None:
    runner = Runner.from_cfg(
        toy_config(
            tmp_path / 'run',
            optim_wrapper=dict(**settings, rho=0.05, optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(by_epoch=False, max_iters=max(expected)),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=interval, log_metric_by_epoch=False)),
            log_processor=dict(by_epoch=False),
        )
    )
    records: list[Any] = [None]
    runner.register_hook(Recorder(records), priority='VERY_HIGH')
    runner.train()
    logged = entries_of(tmp_path / 'run')
    assert [entry['step'] for entry in logged] == list(expected)
    for entry, number in zip(logged, expected.values(), strict=True):
        if number is None:
            assert {key for key in entry if 'sharpness/' in key} == {'sharpness/L_w'}
            assert entry['sharpness/L_w'] == records[entry['step']].loss.item()
            continue
        assert entry.keys() >= SECOND
        record = records[number]
        assert entry['sharpness/L_w'] == record.loss.item()
        assert entry['sharpness/sharpness'] == record.perturbed_loss.item() - record.loss.item()
        assert entry['sharpness/g_norm'] == record.grad_norm.item()


class Recorder(Hook):
    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.records.append(runner.optim_wrapper.last_step)


@pytest.mark.slow
def test_nothing_of_before_a_resume_is_shown(tmp_path: Path) -> None:
    def entries(work_dir: Path, iterations: int, **changes: Any) -> list[tuple[int, bool]]:
        train(
            work_dir,
            optim_wrapper=dict(type='SAMOptimWrapper', interval=4, rho=0.05, optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(by_epoch=False, max_iters=iterations),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=2),
                checkpoint=dict(type='CheckpointHook', interval=6, by_epoch=False),
            ),
            log_processor=dict(by_epoch=False),
            **changes,
        )
        return [(entry['step'], 'sharpness/sharpness' in entry) for entry in entries_of(work_dir)]

    # The second passes are in iterations 1, 5 and 9.
    assert entries(tmp_path / 'begun', 6) == [(2, True), (4, False), (6, True)]
    resumed = entries(tmp_path / 'resumed', 10, resume=True, load_from=str(tmp_path / 'begun' / 'iter_6.pth'))
    assert resumed == [(8, False), (10, True)]


def test_a_plain_wrapper_is_named(tmp_path: Path) -> None:
    plain = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    with pytest.raises(ValueError, match=r'SharpnessHook needs .*uses OptimWrapper(.|\n)*custom_hooks'):
        train(tmp_path / 'run', optim_wrapper=plain)


@pytest.mark.parametrize('settings', [dict(type='SAMOptimWrapper', interval=2), dict(type='LookSAMOptimWrapper', k=2)])
def test_the_first_entry_is_as_complete_as_later_ones(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of 3 micro-batches with a second pass the last one is logged, before it is seen that others have none."""

    def entries(work_dir: Path, iterations: int, **changes: Any) -> dict[int, set[str]]:
        optimizer = dict(type='SGD', lr=0.01)
        train(
            work_dir,
            optim_wrapper=dict(**settings, rho=0.05, accumulative_counts=3, optimizer=optimizer),
            train_cfg=dict(by_epoch=False, max_iters=iterations),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=6),
                checkpoint=dict(type='CheckpointHook', interval=12, by_epoch=False),
            ),
            log_processor=dict(by_epoch=False),
            **changes,
        )
        found = {int(entry['step']): set(entry) for entry in entries_of(work_dir)}
        return {step: keys for step, keys in found.items() if 'sharpness/sharpness' in keys}

    begun = entries(tmp_path / 'begun', 12)
    resumed = entries(tmp_path / 'resumed', 18, resume=True, load_from=str(tmp_path / 'begun' / 'iter_12.pth'))
    # The second passes are in iterations 1 to 3, 7 to 9 and 13 to 15.
    assert (list(begun), list(resumed)) == ([5, 12], [18])
    for entry in (*begun.values(), *resumed.values()):
        assert entry >= SECOND | {'sharpness/share_head'}


def test_a_step_that_always_has_both_passes_is_measured_only_if_it_is_logged(tmp_path: Path) -> None:
    runner = Runner.from_cfg(
        toy_config(
            tmp_path / 'run',
            optim_wrapper=dict(type='LookSAMOptimWrapper', k=1, optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(by_epoch=False, max_iters=4),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=4)),
            log_processor=dict(by_epoch=False),
        )
    )
    records: list[Any] = []
    runner.register_hook(Recorder(records), priority='VERY_HIGH')
    runner.train()
    assert [record.sizes is not None for record in records] == [True, False, False, True]
