"""MMPretrain: the configs on CIFAR train, every sample's loss is right, and its identity survives to the model."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from torch.nn import functional as F  # noqa: N812

import mm_sharp  # noqa: F401  (makes the wrappers known, and mends what MMPretrain needs)
from mm_sharp.per_sample_loss import PerSampleLoss, Reduction
from mm_sharp.samples.keys import keys_of
from tests.conftest import ROOT
from tests.recipe_runs import Steps
from tests.tiny_cifar import PER_FILE, draw_cifar10, draw_cifar100

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec('mmpretrain') is None,
        reason='MMPretrain is not installed: pip install "mm_sharp[classification]"',
    ),
    pytest.mark.filterwarnings('ignore:.*MultiScaleDeformableAttention.* has been moved'),  # mmcv 2.1.0
]

WRAPPERS = {
    'sgd': 'OptimWrapper',
    'sam': 'SAMOptimWrapper',
    'esam': 'ESAMOptimWrapper',
    'ausam': 'AUSAMOptimWrapper',
}
CLASSES = (10, 100)
BATCH = 8
# Pictures in each forward pass of two steps.
PASSES = {
    'sgd': [8, 8],
    'sam': [8, 8, 8, 8],
    'esam': [8, 8, 4, 8, 8, 4],  # the batch, the batch again to select, ceil(0.5 * 8)
    'ausam': [8, 8, 8, 8],  # the first epoch uses whole batches
}
MIXUP = {'augments': [{'type': 'Mixup', 'alpha': 0.8}]}


@pytest.fixture(scope='module')
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Folders with tiny data sets, by the number of classes; MMPretrain takes their MD5 sums for the right ones."""
    from mmpretrain.datasets import CIFAR10, CIFAR100

    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for classes, kind, draw in ((10, CIFAR10, draw_cifar10), (100, CIFAR100, draw_cifar100)):
            folders[classes] = tmp_path_factory.mktemp(f'cifar{classes}')
            sums = draw(folders[classes])
            for files in ('train_list', 'test_list'):
                patch.setattr(kind, files, [[name, sums[name]] for name, _ in getattr(kind, files)])
        yield folders


@functools.cache
def _read(method: str, classes: int) -> Config:
    epochs = 20 if method.startswith('w4a4') else 200
    return Config.fromfile(ROOT / f'configs/classification/resnet18_{method}_b128-{epochs}e_cifar{classes}.py')


def config(method: str, classes: int) -> Config:
    """A config of ours as it is."""
    return copy.deepcopy(_read(method, classes))


def small(method: str, classes: int, folder: Path) -> Config:
    """A config of ours on the data in ``folder``, in this process, with two batches of eight pictures."""
    cfg = config(method, classes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=BATCH, num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(folder), download=False)
    cfg.train_dataloader.dataset.indices = 2 * BATCH
    # A quarter of its width: eight steps a run would take half a minute.
    cfg.model.backbone.base_channels = 16
    cfg.model.head.in_channels = 128
    return cfg


def build(cfg: Config, **preprocessing: Any) -> torch.nn.Module:
    """The config's model alone, as the Runner builds it."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build({**cfg.model, 'data_preprocessor': {**cfg.data_preprocessor, **preprocessing}}).train()


def batch(cfg: Config) -> dict[str, Any]:
    """The first eight training pictures, always cropped and flipped in the same way."""
    np.random.seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return pseudo_collate([dataset[index] for index in range(BATCH)])


def one_epoch(cfg: Config, folder: Path) -> Runner:
    """A Runner for two training steps and an evaluation."""
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(folder)
    cfg.experiment_name = cfg.visualizer.name = folder.name  # MMEngine keeps one message hub for each name
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('classes', [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize('method', WRAPPERS)
def test_two_training_steps_and_an_evaluation(
    method: str, classes: int, cifar: dict[int, Path], tmp_path: Path
) -> None:
    cfg = small(method, classes, cifar[classes])
    runner = one_epoch(cfg, tmp_path)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    passes: list[int] = []
    counter = runner.model.backbone.register_forward_pre_hook(
        lambda module, call: passes.append(len(call[0])) if module.training else None
    )
    runner.train()
    counter.remove()

    assert cfg.default_scope == 'mmpretrain'
    assert type(runner.optim_wrapper).__name__ == WRAPPERS[method]
    assert passes == PASSES[method]
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    after = runner.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    still = [name for name, _ in runner.model.named_parameters() if torch.equal(before[name], after[name])]
    assert not still, 'not trained'
    logged = {key.rpartition('/')[2] for key in runner.message_hub.log_scalars}
    assert ('sharpness' in logged) == (method != 'sgd')
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() == pytest.approx(accuracy(runner))


def accuracy(runner: Runner) -> float:
    """Right answers on the test pictures, in percent, counted by hand."""
    model = runner.model.eval()
    right = total = 0
    for data in runner.val_dataloader:
        pictures = torch.stack(data['inputs']).float()
        mean, std = (torch.tensor(runner.cfg.data_preprocessor[key])[:, None, None] for key in ('mean', 'std'))
        answers = model((pictures - mean) / std).argmax(1)
        right += sum(answer == sample.gt_label for answer, sample in zip(answers, data['data_samples'], strict=True))
        total += len(answers)
    assert total == PER_FILE
    return 100 * int(right) / total


@pytest.mark.slow
@pytest.mark.parametrize('method', [pytest.param('sgd', marks=pytest.mark.slow), 'ausam'])
def test_two_training_steps_at_four_bits(method: str, cifar: dict[int, Path], tmp_path: Path) -> None:
    cfg = small(f'w4a4_{method}', 10, cifar[10])
    assert cfg.load_from.startswith('https://')
    cfg.load_from = None
    cfg.model.backbone.update(stem_channels=8, base_channels=8)
    cfg.model.head.in_channels = 64
    (calibration,) = [hook for hook in cfg.custom_hooks if hook.type == 'CalibrationHook']
    calibration.update(num_batches=1, baseline=False)
    runner = one_epoch(cfg, tmp_path)
    passes: list[int] = []
    counter = runner.model.backbone.register_forward_pre_hook(
        lambda module, call: passes.append(len(call[0])) if module.training else None
    )
    steps = Steps()
    runner.register_hook(steps)
    runner.train()
    counter.remove()

    record = runner.model.quantization
    bits = [(layer.policy.weight_bit_width, layer.policy.act_bit_width) for layer in record.layers]
    assert bits == [(8, 8), *[(4, 4)] * (len(bits) - 2), (8, 8)]
    assert len(record.folded) == len(bits) - 1, 'all but the head have a BatchNorm'
    assert record.input_size == (32, 32)
    assert type(runner.optim_wrapper).__name__ == WRAPPERS[method]
    assert passes == PASSES[method], 'calibration and evaluation are in evaluation mode'
    assert not steps.left_out(runner.model)
    names = {parameter: name for name, parameter in runner.model.named_parameters()}
    groups = runner.optim_wrapper.optimizer.param_groups
    decays = {names[parameter]: group['weight_decay'] for group in groups for parameter in group['params']}
    assert {('tensor_quant' in name, decay) for name, decay in decays.items()} == {(True, 0.0), (False, 1e-4)}
    assert 'val/accuracy/top1' in runner.message_hub.log_scalars


@pytest.mark.parametrize('method', WRAPPERS)
def test_at_four_bits_the_float_training_is_continued(method: str) -> None:
    """With less of everything, and the same method on the same data."""
    ours, plain = config(f'w4a4_{method}', 10).to_dict(), config(method, 10).to_dict()
    assert [ours['train_cfg'].pop('max_epochs'), ours['param_scheduler'].pop('T_max')] == [20, 20]
    assert ours['param_scheduler'].pop('end') == 20
    for key in ('max_epochs', 'T_max', 'end'):
        plain['train_cfg'].pop(key, None)
        plain['param_scheduler'].pop(key, None)
    same = ('train_cfg', 'param_scheduler', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'data_preprocessor')
    assert {key: ours[key] for key in same} == {key: plain[key] for key in same}
    assert ours['model'].pop('policy')['input_size'] == (32, 32)
    assert ours['model'] == {**plain['model'], 'type': 'QuantizedModel', 'model': 'ImageClassifier'}
    assert ours.get('sharp_optim_wrapper') == plain.get('sharp_optim_wrapper')
    assert ours['optim_wrapper']['optimizer'] == {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'weight_decay': 1e-4}
    hooks = [hook['type'] for hook in ours['custom_hooks']]
    assert hooks == ['FreezeHook', *(['SharpnessHook'] if method != 'sgd' else []), 'CalibrationHook']


def test_card_and_metafile_list_every_config() -> None:
    folder = ROOT / 'configs' / 'classification'
    names = {path.stem for path in folder.glob('*.py')}
    assert len(names) == 12
    assert {f'{name}.py' for name in names} == set(
        re.findall(r'\]\((\w+\S+\.py)\)', (folder / 'README.md').read_text())
    )
    listed = {model['Name']: model for model in mmengine.load(folder / 'metafile.yml')['Models']}
    # MMPretrain has SGD itself.
    assert set(listed) == {name for name in names if not name.startswith('resnet18_sgd')}
    for name, model in listed.items():
        method = 'QAT' if 'w4a4' in name else name.split('_')[1].upper()
        data = 'CIFAR-' + name.rpartition('cifar')[2]
        found = (model['Config'], model['In Collection'], model['Metadata']['Training Data'])
        assert found == (f'configs/classification/{name}.py', method, data)


def test_the_float_weights_are_those_that_mmpretrain_publishes(tmp_path: Path) -> None:
    import mmpretrain

    metafile = Path(mmpretrain.__file__).parent / '.mim' / 'configs' / 'resnet' / 'metafile.yml'
    (entry,) = [model for model in mmengine.load(metafile)['Models'] if model['Name'] == 'resnet18_8xb16_cifar10']
    cfg = config('w4a4_sgd', 10)
    assert cfg.load_from == entry['Weights']
    assert str(entry['Results'][0]['Metrics']['Top 1 Accuracy']) in Path(cfg.filename).read_text()
    (tmp_path / 'theirs.py').write_text("_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'")
    theirs = Config.fromfile(tmp_path / 'theirs.py')
    ours = config('sgd', 10)
    assert (theirs.model, theirs.data_preprocessor) == (ours.model, ours.data_preprocessor)
    assert theirs.optim_wrapper.optimizer.lr == pytest.approx(10 * cfg.optim_wrapper.optimizer.lr)
    assert theirs.optim_wrapper.optimizer.weight_decay == cfg.optim_wrapper.optimizer.weight_decay


def test_the_loader_draws_pictures_before_it_reads_them(
    cifar: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And under the keys by which the wrapper knows them again: it refuses a batch of others."""
    from mmpretrain.datasets import CIFAR10

    cfg = small('ausam', 10, cifar[10])
    cfg.train_dataloader.batch_sampler = {'type': 'AUSAMSampler'}
    cfg.optim_wrapper.update(schedule='constant', sampling_ratio=0.6)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = one_epoch(cfg, tmp_path)
    read: list[int] = []
    load = CIFAR10.prepare_data
    monkeypatch.setattr(CIFAR10, 'prepare_data', lambda self, index: (read.append(index), load(self, index))[1])
    runner.train()

    assert len(read) == len(set(read)) == 2 * math.ceil(0.6 * BATCH)
    scores = runner.optim_wrapper.history.scores([('', index) for index in range(2 * BATCH)])
    assert {index for index, score in enumerate(scores) if not math.isnan(score)} == set(read)


@pytest.mark.parametrize('method', WRAPPERS)
def test_the_data_sets_differ_in_nothing_but_the_data(method: str) -> None:
    ten, hundred = (config(method, classes).to_dict() for classes in CLASSES)
    for cfg, classes in ((ten, 10), (hundred, 100)):
        assert cfg['model']['head'].pop('num_classes') == cfg['data_preprocessor']['num_classes'] == classes
    named = ('dataset_type', 'data_preprocessor', 'train_dataloader', 'val_dataloader', 'test_dataloader')
    assert {k: v for k, v in ten.items() if k not in named} == {k: v for k, v in hundred.items() if k not in named}


@pytest.mark.parametrize('classes', CLASSES)
@pytest.mark.parametrize('method', [method for method in WRAPPERS if method != 'sgd'])
def test_the_methods_differ_in_nothing_but_the_wrapper(method: str, classes: int) -> None:
    ours, plain = (config(name, classes).to_dict() for name in (method, 'sgd'))
    added = {'optim_wrapper', 'custom_hooks', 'custom_imports', 'sharp_optim_wrapper', 'sharp_hook'}
    assert {k: v for k, v in ours.items() if k not in added} == {k: v for k, v in plain.items() if k != 'optim_wrapper'}
    assert ours['optim_wrapper']['type'] == WRAPPERS[method]
    assert ours['optim_wrapper']['optimizer'] == plain['optim_wrapper']['optimizer']


@pytest.mark.parametrize('method', [*WRAPPERS, 'w4a4_sgd', 'w4a4_ausam'])
def test_written_and_read_again_it_is_the_same(method: str, tmp_path: Path) -> None:
    cfg = config(method, 10)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize(('classes', 'parameters'), [(10, 11_173_962), (100, 11_220_132)])
def test_the_model_is_resnet_18(classes: int, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in build(config('sgd', classes)).parameters()) == parameters


def test_the_papers_hyperparameters() -> None:
    cfg = config('esam', 10)
    wrapper = cfg.optim_wrapper
    assert (wrapper.rho, wrapper.beta, wrapper.gamma) == (0.05, 0.6, 0.5)
    assert wrapper.optimizer == {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-3}
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler.T_max == 200
    assert cfg.auto_scale_lr.base_batch_size == 128


LOSSES = {
    'cross entropy': ({'type': 'CrossEntropyLoss'}, {}),
    'cross entropy, weighted': ({'type': 'CrossEntropyLoss', 'loss_weight': 0.3}, {}),
    'label smoothing': ({'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1}, {}),
    'mixup': ({'type': 'CrossEntropyLoss', 'use_soft': True}, {'batch_augments': MIXUP}),
    'mixup and label smoothing': ({'type': 'LabelSmoothLoss', 'label_smooth_val': 0.1}, {'batch_augments': MIXUP}),
}


@pytest.mark.parametrize(
    ('classes', 'dtype'), [(10, torch.bfloat16), (100, None)], ids=['10 in bfloat16', '100 in float32']
)
@pytest.mark.parametrize('loss', LOSSES)
def test_the_losses_of_samples_are_torchs(
    loss: str, classes: int, dtype: torch.dtype | None, cifar: dict[int, Path]
) -> None:
    cfg = small('esam', classes, cifar[classes])
    cfg.model.head.loss, preprocessing = LOSSES[loss]
    model = build(cfg, **preprocessing)
    scores: list[torch.Tensor] = []
    model.head.fc.register_forward_hook(lambda *call: scores.append(call[2].detach().float()))
    data = model.data_preprocessor(batch(cfg), training=True)
    per_sample = PerSampleLoss(model)
    with torch.autocast('cpu', dtype, enabled=dtype is not None), per_sample.record() as record:
        total, _ = model.parse_losses(model(**data, mode='loss'))

    samples = data['data_samples']
    mixed = 'batch_augments' in preprocessing
    target = torch.stack([s.gt_score for s in samples]) if mixed else torch.cat([s.gt_label for s in samples])
    expected = F.cross_entropy(
        scores[0], target, reduction='none', label_smoothing=cfg.model.head.loss.get('label_smooth_val', 0.0)
    ) * cfg.model.head.loss.get('loss_weight', 1.0)
    # Under autocast a part of the loss is in bfloat16, which rounds to 2^-9.
    tolerance = {'rtol': 1e-5, 'atol': 0} if dtype is None else {'rtol': 1e-2, 'atol': 1e-2}
    torch.testing.assert_close(record.losses(total), expected, **tolerance)
    torch.testing.assert_close(total.detach().float(), expected.mean(), **tolerance)
    assert record.reduction is Reduction.MEAN


@pytest.mark.parametrize('augments', [None, MIXUP], ids=['alone', 'mixup'])
def test_the_model_is_told_which_samples_it_sees(augments: dict[str, Any] | None, cifar: dict[int, Path]) -> None:
    """With Mixup a row keeps its own picture's index, whatever was mixed into it."""
    cfg = small('ausam', 10, cifar[10])
    data = build(cfg, batch_augments=augments).data_preprocessor(batch(cfg), training=True)
    numbers = [number for _, number in keys_of((), data, BATCH, 'the test')]
    assert numbers == list(range(BATCH))


def test_a_damaged_file_is_not_trained_on(tmp_path: Path, cifar: dict[int, Path]) -> None:
    """The MD5 sums that the other tests put in MMPretrain's place are compared."""
    draw_cifar10(tmp_path, seed=1)
    with pytest.raises(RuntimeError, match='Cannot find CIFAR10 dataset'):
        batch(small('sgd', 10, tmp_path))
