"""The digits of the accuracy study: splits, flipped labels, model, metric, and the config with every wrapper."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mm_sharp.analysis.study.digits import CLASSES, DigitsAccuracy, DigitsDataset, DigitsNet, flip_labels
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / 'configs' / 'study').glob('digits_cnn*.py'))
WRAPPERS: dict[str, dict[str, Any]] = {
    'sam': dict(type='SAMOptimWrapper', rho=0.05),
    'esam-history': dict(type='ESAMOptimWrapper', rho=0.05, selection='history'),
    'ausam-reweight': dict(type='AUSAMOptimWrapper', rho=0.05, sampling_ratio=0.5, reweight=True, schedule='constant'),
}


def runner_of(path: Path, work_dir: Path, epochs: int, **wrapper: Any) -> Runner:
    cfg = Config.fromfile(path)
    cfg.optim_wrapper.update(wrapper)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.param_scheduler.update(T_max=epochs, end=epochs)
    cfg.update(work_dir=str(work_dir), log_level='ERROR', experiment_name=work_dir.name, randomness=dict(seed=0))
    return Runner.from_cfg(cfg)


def test_the_splits_are_disjoint_complete_and_balanced() -> None:
    splits = [DigitsDataset(split) for split in ('train', 'select', 'report')]
    assert [len(split) for split in splits] == [800, 297, 700]
    assert sorted(torch.cat([split.ids for split in splits]).tolist()) == list(range(1797))
    for split in [*splits, DigitsDataset('train', size=100)]:
        counts = np.bincount(split.targets.numpy(), minlength=CLASSES)
        assert counts.max() - counts.min() <= 0.03 * len(split) + 2
        assert split.inputs.shape == (len(split), 1, 8, 8)
        assert (split.inputs.min(), split.inputs.max()) == (-1, 1)
        assert torch.equal(split.targets, split.true_targets)


def test_a_sample_has_its_own_picture_label_and_id() -> None:
    from sklearn.datasets import load_digits

    digits, split = load_digits(), DigitsDataset('report')
    for index in (0, 17, 699):
        sample = split[index]
        row = sample['sample_idx']
        assert split.get_data_info(index) == {'sample_idx': row}
        assert int(sample['targets']) == digits.target[row]
        assert torch.equal(sample['inputs'][0], torch.tensor(digits.images[row] / 8 - 1).float())


def test_fewer_samples_are_the_first_of_all() -> None:
    few, all_of_them = DigitsDataset(size=200), DigitsDataset()
    assert torch.equal(few.ids, all_of_them.ids[:200])


def test_flipped_labels_are_counted_exactly_and_spread_over_the_other_classes() -> None:
    clean, noisy = DigitsDataset(), DigitsDataset(flipped=0.2, seed=3)
    assert torch.equal(noisy.true_targets, clean.targets)
    assert int((noisy.targets != noisy.true_targets).sum()) == 160
    assert torch.equal(noisy.targets, DigitsDataset(flipped=0.2, seed=3).targets)
    assert not torch.equal(noisy.targets, DigitsDataset(flipped=0.2, seed=4).targets)
    zeros = np.zeros(9000, np.int64)
    counts = np.bincount(flip_labels(zeros, 1.0, 0), minlength=CLASSES)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 1000).max() < 5 * 1000**0.5
    assert not zeros.any()


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (dict(split='test'), "split='test'"),
        (dict(flipped=1.2), 'flipped=1.2'),
        (dict(flipped=True), 'flipped=True'),
        (dict(size=0), 'size=0'),
        (dict(size=801), 'size=801'),
        (dict(split='select', flipped=0.2), 'training split alone'),
        (dict(split='report', size=10), 'training split alone'),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=r"DigitsDataset: .*is not allowed.*dataset = dict\(type='DigitsDataset'") as e:
        DigitsDataset(**arguments)
    assert named in str(e.value)


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r'DigitsNet: width=0 is not allowed'):
        DigitsNet(width=0)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        DigitsDataset()


def test_the_metric_is_the_share_of_right_ones_and_their_likelihood() -> None:
    metric = DigitsAccuracy()
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]]).log()
    targets = [0, 1, 2, 0]
    samples = [{'log_probabilities': r, 'target': torch.tensor(t)} for r, t in zip(rows, targets, strict=True)]
    metric.process({}, samples[:3])
    metric.process({}, samples[3:])
    found = metric.evaluate(4)
    assert found['digits/accuracy'] == 75
    assert found['digits/nll'] == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.4]).mean())


def test_predictions_are_the_logits_of_each_sample() -> None:
    net, data = DigitsNet().eval(), DigitsDataset('select')
    batch = dict(inputs=data.inputs[:5], targets=data.targets[:5])
    logits = net(**batch)
    rows = torch.stack([sample['log_probabilities'] for sample in net(**batch, mode='predict')])
    assert torch.equal(rows, logits.log_softmax(1))
    assert float(net(**batch, mode='loss')['loss_cls'].detach()) == pytest.approx(
        float(-rows.detach()[torch.arange(5), batch['targets']].mean())
    )


@pytest.mark.parametrize('method', WRAPPERS)
def test_every_method_trains_by_the_config(method: str, tmp_path: Path) -> None:
    runner = runner_of(CONFIGS[0], tmp_path, epochs=1, **WRAPPERS[method])
    runner.train()
    assert runner.message_hub.log_scalars['val/digits/accuracy'].current() > 30
    if method != 'sam':
        # AUSAM sees half of every batch; the history of ESAM is written in two of the 20 steps, of 40 samples each.
        assert len(runner.optim_wrapper.history) == {'ausam-reweight': 400, 'esam-history': 80}[method]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_base_optimizer_learns_and_the_schedule_ends_with_the_training(path: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    assert cfg.param_scheduler.T_max == cfg.param_scheduler.end == cfg.train_cfg.max_epochs == cfg.max_epochs
    assert cfg.optim_wrapper.optimizer.lr == cfg.base_lr
    assert cfg.optim_wrapper.optimizer.weight_decay == cfg.weight_decay
    assert cfg.train_dataloader.batch_size == cfg.batch_size
    assert [cfg[f'{kind}_dataloader'].dataset.split for kind in ('train', 'val', 'test')] == [
        'train',
        'select',
        'report',
    ]
    runner = runner_of(path, tmp_path, epochs=8 if path.stem.endswith('200') else 3)
    runner.train()
    assert runner.message_hub.log_scalars['val/digits/accuracy'].current() > 80
    assert runner.test()['digits/accuracy'] > 80


def test_the_sampler_draws_before_loading(tmp_path: Path) -> None:
    cfg = Config.fromfile(CONFIGS[0])
    cfg.train_dataloader.batch_sampler = dict(type='AUSAMSampler')
    cfg.optim_wrapper.update(WRAPPERS['ausam-reweight'])
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.update(work_dir=str(tmp_path), log_level='ERROR', experiment_name=tmp_path.name)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(runner.optim_wrapper.history) == 400
