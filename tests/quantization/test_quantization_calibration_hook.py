"""Calibration in a Runner: once, before training, reported, and without a trace in what follows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor

from mm_sharp.quantization import CalibrationHook, calibration_hook, is_calibrated
from mm_sharp.quantization.calibration_hook import CHECKPOINT
from tests.conftest import ROOT
from tests.distributed import run
from tests.mmpose_cases import QUIET
from tests.quantized_toys import ResidualToy
from tests.tiny_data import NARROW_RECIPE, draw_coco
from tests.toys import Batch, ToySamples, same_bits, same_state, toy_config

pytestmark = QUIET
DEMO = ROOT / 'configs' / 'demo' / 'simcc_res18-half_demo-128x96.py'
POLICY = dict(weight_bit_width=4, act_bit_width=4, scale_init='max')
SAM = dict(type='SAMOptimWrapper', rho=0.05)
_numbers = itertools.count()

# Without a best checkpoint, and quiet: two steps an epoch.
NARROW = (
    NARROW_RECIPE
    + """
default_hooks['checkpoint'].update(save_best=None)
log_level = 'WARNING'
"""
)
QUANTIZED = """
_base_ = 'float.py'
custom_imports = dict(imports=['mm_sharp'])
sharp_quantization = dict(policy={policy}, calibration=dict(num_batches=2))
load_from = '{float}'
"""


@DATA_SAMPLERS.register_module()
class CountingSampler(DefaultSampler):
    """Counts how often it is gone through."""

    passes: ClassVar[int] = 0

    def __iter__(self) -> Iterator[int]:
        type(self).passes += 1
        return super().__iter__()


@HOOKS.register_module()
class NoteStart(Hook):
    """What the model and the random state are when the first epoch starts."""

    def before_train_epoch(self, runner: Runner) -> None:
        if not hasattr(self, 'random'):
            self.random = (torch.get_rng_state(), np.random.get_state()[1].copy())
            self.state = {name: value.clone() for name, value in runner.model.state_dict().items()}
            averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
            self.averages = [same_state(average, runner.model) for average in averages]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs ``float.py`` and ``quantized.py``, the drawn people, and the checkpoint of a float model."""
    folder = tmp_path_factory.mktemp('calibration')
    data = draw_coco(folder / 'people')
    (folder / 'float.py').write_text(NARROW.format(base=DEMO, data=data, width=4))
    (folder / 'quantized.py').write_text(QUANTIZED.format(policy=POLICY, float=folder / 'float.pth'))
    cfg = Config.fromfile(folder / 'float.py')
    init_default_scope('mmpose')
    torch.manual_seed(7)
    model = MODELS.build(cfg.model)
    for name, buffer in model.named_buffers():
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'float.pth')
    return folder


def build(folder: Path, **changes: Any) -> Runner:
    cfg = Config.fromfile(folder / 'quantized.py')
    cfg.work_dir = str(folder / f'run{next(_numbers)}')
    # MMEngine keeps loggers and visualizers by their names for as long as the process lives.
    cfg.experiment_name = cfg.visualizer.name = f'calibration{next(_numbers)}'
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='NoteStart'), *changes.pop('hooks', [])]
    for name, value in changes.items():
        if name == 'calibration':
            next(hook for hook in cfg.custom_hooks if hook['type'] == 'CalibrationHook').update(value)
        elif isinstance(value, dict):
            cfg[name].update(value)
        else:
            cfg[name] = value
    return Runner.from_cfg(cfg)


def trained(folder: Path, **changes: Any) -> Runner:
    runner = build(folder, **changes)
    runner.train()
    return runner


def trained_by(runner: Runner) -> str:
    runner.train()
    return log_of(runner)


def start_of(runner: Runner) -> NoteStart:
    return next(hook for hook in runner.hooks if isinstance(hook, NoteStart))


def calibrations(runner: Runner) -> int:
    """How often it was calibrated, by its log."""
    return log_of(runner).count('Calibrating the quantizers on')


def log_of(runner: Runner) -> str:
    return ''.join(path.read_text() for path in sorted(Path(runner.work_dir).glob('*/*.log')))


def figures_of(runner: Runner) -> list[dict[str, Any]]:
    (file,) = Path(runner.work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope='module')
def base(folder: Path) -> Runner:
    """A run of two steps with the base optimizer, from the float model."""
    CountingSampler.passes = 0
    loader = dict(sampler=dict(type='CountingSampler', shuffle=True))
    return trained(folder, train_dataloader=loader, log_level='INFO')


# ------------------------------------------------------------------ a run
@pytest.mark.slow
def test_a_run_calibrates_once_before_training(base: Runner) -> None:
    assert is_calibrated(base.model)
    assert calibrations(base) == 1
    assert 'Calibrating the quantizers on 2 training batches' in log_of(base)
    assert log_of(base).count('Loaded the checkpoint of a float model') == 1
    assert any('tensor_quant' in name for name in start_of(base).state)
    assert CountingSampler.passes == 1, "training's own sampler is gone through by training alone"
    steps = [line for line in figures_of(base) if 'loss' in line]
    assert [line['step'] for line in steps] == [1, 2]


def test_the_accuracy_before_training_is_logged_and_its_model_saved(base: Runner, folder: Path) -> None:
    lines = [line for line in figures_of(base) if any(name.startswith('post_training/') for name in line)]
    assert len(lines) == 1
    logged = {name.removeprefix('post_training/'): value for name, value in lines[0].items() if name != 'step'}
    assert {'coco/AP', 'PCK'} <= logged.keys()
    assert log_of(base).count('Before training (post-training quantization, post_training.pth):') == 1
    assert f'PCK: {logged["PCK"]:.4f}' in log_of(base)

    file = Path(base.work_dir) / CHECKPOINT
    saved = torch.load(file, weights_only=True)
    assert saved['state_dict'].keys() == start_of(base).state.keys()
    assert all(same_bits(value, start_of(base).state[name]) for name, value in saved['state_dict'].items())
    assert 'optimizer' not in saved
    assert not (Path(base.work_dir) / 'last_checkpoint').read_text().endswith(CHECKPOINT)
    tested = build(folder, load_from=str(file))
    assert tested.test() == logged


def test_what_is_nothing_in_float_too_is_a_warning(base: Runner) -> None:
    """The weights are random here."""
    assert (
        log_of(base).count(
            'coco/AP is 0.0000 without the quantizers, too, so the quantizers are not the cause: look at'
        )
        == 1
    )


@pytest.mark.slow
def test_a_collapse_is_measured_against_the_float_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, float]] = []

    def warning(model: Any, batch: Any, metrics: dict[str, float], evaluate_float: Any) -> str:
        measured.extend([dict(metrics), evaluate_float()])
        return 'collapsed'

    monkeypatch.setattr(calibration_hook, 'collapse_warning', warning)
    runner = build(folder, log_level='INFO')
    logged = trained_by(runner)
    plain = Config.fromfile(folder / 'float.py')
    plain.update(load_from=str(folder / 'float.pth'), work_dir=runner.work_dir, experiment_name=f'val{next(_numbers)}')
    plain.visualizer.name = plain.experiment_name
    quantized, floats = measured
    assert floats == pytest.approx(Runner.from_cfg(plain).val(), abs=1e-3)
    assert floats != quantized
    assert logged.count('collapsed') == 1
    assert is_calibrated(runner.model)


def test_training_from_the_saved_model_is_training_from_the_float_model(base: Runner, folder: Path) -> None:
    """Bit for bit: calibration and the validation after it leave no trace in random numbers, sampler or model."""
    again = trained(folder, load_from=str(Path(base.work_dir) / CHECKPOINT), log_level='INFO')
    assert calibrations(again) == 0
    assert 'have their scales from the checkpoint: nothing to calibrate' in log_of(again)
    assert not (Path(again.work_dir) / CHECKPOINT).exists()
    first, second = (start_of(runner) for runner in (base, again))
    assert torch.equal(first.random[0], second.random[0])
    assert np.array_equal(first.random[1], second.random[1])
    assert same_state(again.model, base.model)
    assert any(not same_bits(value, start_of(base).state[name]) for name, value in base.model.state_dict().items())


@pytest.mark.slow
def test_without_the_baseline_training_is_the_same(base: Runner, folder: Path) -> None:
    runner = trained(folder, calibration=dict(baseline=False), log_level='INFO')
    assert calibrations(runner) == 1
    assert same_state(runner.model, base.model)
    assert not (Path(runner.work_dir) / CHECKPOINT).exists()
    assert not any(name.startswith('post_training') for line in figures_of(runner) for name in line)


def test_a_run_that_resumes_does_not_calibrate(base: Runner, folder: Path) -> None:
    file = str(Path(base.work_dir) / 'epoch_1.pth')
    runner = trained(folder, load_from=file, resume=True, train_cfg=dict(max_epochs=2), log_level='INFO')
    assert runner.iter == 4
    assert calibrations(runner) == 0
    state = start_of(runner).state
    assert all(same_bits(value, state[name]) for name, value in base.model.state_dict().items())


@pytest.mark.slow
def test_sam_with_averaged_weights_and_without_a_float_model(base: Runner, folder: Path) -> None:
    runner = trained(
        folder,
        load_from=None,
        optim_wrapper=SAM,
        hooks=[dict(type='EMAHook')],
        calibration=dict(num_batches=50, bias_correction=True),
        log_level='INFO',
    )
    assert type(runner.optim_wrapper).__name__ == 'SAMOptimWrapper'
    assert calibrations(runner) == 1
    assert 'on 2 training batches' in log_of(runner), 'there are no more'
    assert 'No load_from: the model that is quantized has random or pretrained weights only' in log_of(runner)
    assert 'No load_from' not in log_of(base)
    assert 'weights were loaded' not in log_of(base)  # quantizers alone are without a value
    assert start_of(runner).averages == [True], 'EMAHook copied the model before it was calibrated'
    saved = torch.load(Path(runner.work_dir) / CHECKPOINT, weights_only=True)
    averaged = {
        name.removeprefix('module.'): value for name, value in saved['ema_state_dict'].items() if name != 'steps'
    }
    assert all(same_bits(value, averaged[name]) for name, value in saved['state_dict'].items())


def test_a_config_and_a_checkpoint_are_enough_for_mmposes_inference(base: Runner, folder: Path) -> None:
    from mmpose.apis import inference_topdown, init_model

    model = init_model(str(folder / 'quantized.py'), str(Path(base.work_dir) / 'epoch_1.pth'), device='cpu')
    assert is_calibrated(model)
    assert same_state(model, base.model)
    (result,) = inference_topdown(model, np.zeros((128, 96, 3), dtype=np.uint8))
    assert result.pred_instances.keypoints.shape == (1, 17, 2)


# ------------------------------------------------------------------ the hook
@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(('num_batches', value) for value in (0, -1, 1.5, '16', None, True)),
        *((name, value) for name in ('bias_correction', 'baseline') for value in (1, 'yes', None)),
    ],
)
def test_a_bad_argument_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        CalibrationHook(**{name: value})
    assert f'CalibrationHook: {name}={value!r}' in str(caught.value)


def test_float_runs_have_nothing_to_calibrate(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(tmp_path / 'plain'))
    assert any(isinstance(hook, CalibrationHook) for hook in runner.hooks)
    runner.train()
    assert runner.iter == 10


@pytest.mark.parametrize(
    ('rho', 'adaptive', 'model', 'told'),
    [
        (0.02, 'tensor', 'quantized', True),
        (0.005, 'tensor', 'quantized', False),
        (0.05, False, 'quantized', False),  # a length: what is right depends on the model
        (0.02, 'tensor', 'float', False),
    ],
)
def test_a_float_models_rho_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rho: float, adaptive: bool | str, model: str, told: bool
) -> None:
    own = dict(first_layers='same', last_layers='same', input_size=(6, 6))
    quantized = dict(type='QuantizedModel', model='ResidualToy', policy={**POLICY, **own})
    config = toy_config(
        tmp_path / 'toy',
        model=quantized if model == 'quantized' else dict(type='ResidualToy'),
        custom_hooks=[],
        optim_wrapper=dict(type='SAMOptimWrapper', rho=rho, adaptive=adaptive, optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
    )
    config['train_dataloader']['dataset'] = dict(type='ResidualSamples', count=8)
    log = trained_by(Runner.from_cfg(config))
    line = "rho=0.02 of each tensor's norm is large for a quantized model: 0.005 was found right."
    assert log.count(line) == told
    assert log.count('write optim_wrapper = dict(rho=0.005)') == told


def test_resuming_what_has_no_scales_is_refused(folder: Path) -> None:
    runner = build(folder)
    runner.train_loop._iter = 5
    with pytest.raises(RuntimeError, match=r'resumes at iteration 5, .* no scales .* load_from=…, without --resume'):
        CalibrationHook().before_train(runner)


# ------------------------------------------------------------------ several processes
@DATASETS.register_module()
class NoisyPictures(ToySamples):
    """Every rank draws other noise: nothing but the hook makes their scales equal."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        generator = torch.Generator().manual_seed(0)
        for row in self.rows:
            row['inputs'] = torch.randn(3, 6, 6, generator=generator)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index]
        return {**row, 'inputs': row['inputs'] + 0.3 * torch.randn(3, 6, 6)}


@MODELS.register_module()
class FrozenToy(ResidualToy):
    """Freezes a layer, and whatever is in it, in training mode: as MMPose's backbones freeze their stages."""

    def __init__(self) -> None:
        super().__init__()
        self.train()

    def train(self, mode: bool = True) -> FrozenToy:
        super().train(mode)
        for parameter in self.conv.parameters():
            parameter.requires_grad_(False)
        return self


def on_ranks(rank: int, processes: int, work_dir: str) -> dict[str, Tensor]:
    """One epoch on each rank; what each rank's model was when it started, and at the end."""
    own = dict(first_layers='same', last_layers='same', fold_batchnorm=False, input_size=(6, 6))
    config = toy_config(
        Path(work_dir),
        model=dict(type='QuantizedModel', model='FrozenToy', policy={**POLICY, **own}),
        custom_hooks=[dict(type='CalibrationHook', num_batches=2), dict(type='NoteStart')],
        train_cfg=dict(by_epoch=True, max_epochs=1),
        launcher='pytorch',
        model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),
    )
    config['train_dataloader']['dataset'] = dict(type='NoisyPictures', count=24)
    runner = Runner.from_cfg(config)
    runner.train()
    parameters = {f'end {name}': value.detach() for name, value in runner.model.module.named_parameters()}
    start = {f'start {name.removeprefix("module.")}': value for name, value in start_of(runner).state.items()}
    return {**start, **parameters, 'steps': torch.tensor(runner.iter)}


@pytest.mark.slow
def test_ranks_start_and_end_with_the_same_scales(tmp_path: Path) -> None:
    first, second = run(on_ranks, 2, str(tmp_path / 'ranks'))
    assert int(first['steps']) == 3
    scales = [name for name in first if 'tensor_quant' in name]
    assert len(scales) == 2 * 6
    assert all(same_bits(value, second[name]) for name, value in first.items())
    moved = {name for name in scales if name.startswith('end')} & {
        name for name in scales if not same_bits(first[name], first[name.replace('end', 'start')])
    }
    assert {name.split('.')[0] for name in moved} == {'end branch', 'end head'}, 'scales of frozen layers are frozen'
