"""Runs that fail for what their data and their model are: what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.runner import Runner

from mm_sharp.errors import UsageError
from mm_sharp.hooks.start import missing_samples
from tests.toys import ToySamples, toy_config


class FewSamples(ToySamples):
    """As many as ``indices`` says, if there are so many: as MMEngine's data sets."""

    def __init__(self, count: int, indices: int | None = None) -> None:
        super().__init__(count if indices is None else min(count, indices))


def runner_of(tmp_path: Path, scheduler: Any = None, **loader: Any) -> Runner:
    config = toy_config(tmp_path / 'run', param_scheduler=scheduler)
    config['train_dataloader'].update(loader)
    return Runner.from_cfg(config)


FAILS: dict[str, Any] = dict(type='LinearLR', convert_to_iter_based=True, end=1)


@pytest.mark.parametrize('scheduler', [FAILS, None])  # without one, MMEngine has nothing to say
def test_data_that_make_no_batch_are_refused(tmp_path: Path, scheduler: Any) -> None:
    runner = runner_of(tmp_path, scheduler, dataset=dict(type=FewSamples, count=3), drop_last=True)
    with pytest.raises(UsageError, match=r'makes no batch: 3 samples, batch_size=4, drop_last=True: give it more'):
        runner.train()


@pytest.mark.parametrize(('indices', 'said'), [(12, False), (20, False), (21, True), (None, False)])
def test_more_samples_than_there_are_are_said(
    tmp_path: Path, indices: int | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr('mm_sharp.hooks.start.print_log', lambda line, **_: lines.append(line))
    runner = runner_of(tmp_path, dataset=dict(type=FewSamples, count=20, indices=indices))
    runner.train()
    line = f'train_dataloader.dataset.indices={indices}: the data set has 20 samples'
    assert (line in lines) == said
    assert missing_samples(runner) == (line if said else '')


@pytest.mark.parametrize('keypoints', [14, 17])
def test_a_head_for_other_keypoints_is_named_if_the_first_step_fails(
    tmp_path: Path, keypoints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr('mm_sharp.config.failure.print_log', lambda line, **_: lines.append(line))
    runner = runner_of(tmp_path)
    runner.model.head.out_channels = 17
    monkeypatch.setattr(ToySamples, 'metainfo', {'keypoint_id2name': dict.fromkeys(range(keypoints))}, raising=False)
    monkeypatch.setattr(type(runner.model), 'forward', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    expected = 'model.head.out_channels=17, and the training data has 14 keypoints: is that what does not fit?'
    assert lines == ([expected] if keypoints == 14 else [])
