"""Which runs save plain checkpoints, and that these resume, test and train on like any other."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer

from mm_sharp.compat.plain_checkpoint import from_plain
from tests.tiny_runs import PLAIN, SAM, make_runner, record_warnings


def globals_in(path: Path) -> set[str]:
    """Every class and function that unpickling a checkpoint would look up."""
    with zipfile.ZipFile(path) as file:
        name = next(name for name in file.namelist() if name.endswith('data.pkl'))
        data = file.read(name)
    return {str(arg) for code, arg, _ in pickletools.genops(data) if code.name == 'GLOBAL'}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The work directory of a SAM run of two epochs, with a checkpoint of each."""
    make_runner(tmp_path).train()
    return tmp_path


@pytest.fixture
def saved_by_mmengine(tmp_path: Path) -> Path:
    """As ``saved``, by MMEngine's own wrapper, and so with MMEngine's own checkpoints."""
    make_runner(tmp_path, PLAIN).train()
    return tmp_path


def test_checkpoint_is_plain(saved: Path) -> None:
    checkpoint = torch.load(saved / 'epoch_2.pth', weights_only=True)
    assert {'meta', 'state_dict', 'message_hub', 'optimizer'} <= set(checkpoint)
    found = globals_in(saved / 'epoch_2.pth')
    assert not [name for name in found if not name.startswith(('torch', 'collections OrderedDict', '_codecs'))]


def test_checkpoint_of_mmengine_alone_is_left_as_it_is(saved_by_mmengine: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved_by_mmengine / 'epoch_2.pth', weights_only=True)
    assert any('HistoryBuffer' in name for name in globals_in(saved_by_mmengine / 'epoch_2.pth'))


def test_resume_restores_the_log(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.load(saved / 'epoch_1.pth', weights_only=True)
    resumed = make_runner(saved, resume=True, load_from=str(saved / 'epoch_1.pth'))
    with record_warnings(resumed) as lines:
        resumed.train()
    assert not [line for line in lines if 'metainfo' in line or 'message_hub' in line], lines
    logs = resumed.message_hub.log_scalars
    expected = from_plain(before['message_hub'])['log_scalars']
    assert set(expected) >= {'train/loss', 'train/lr'}
    for name, history in expected.items():
        count = len(history.data[0])
        assert count == 2
        assert len(logs[name].data[0]) == 4
        np.testing.assert_array_equal(logs[name].data[0][:count], history.data[0])
        np.testing.assert_array_equal(logs[name].data[1][:count], history.data[1])
    assert resumed.epoch == 2


def assert_same_history(got: HistoryBuffer, expected: HistoryBuffer) -> None:
    for new, old in zip(got.data, expected.data, strict=True):
        np.testing.assert_array_equal(new, old)


def test_resume_equals_never_having_stopped(saved: Path, tmp_path: Path) -> None:
    resumed = make_runner(tmp_path / 'again', resume=True, load_from=str(saved / 'epoch_1.pth'))
    resumed.train()
    states = [torch.load(folder / 'epoch_2.pth', weights_only=True) for folder in (saved, tmp_path / 'again')]
    for name, weight in states[0]['state_dict'].items():
        assert torch.equal(weight, states[1]['state_dict'][name])
    losses = [from_plain(state['message_hub'])['log_scalars']['train/loss'] for state in states]
    assert_same_history(losses[1], losses[0])


def test_testing_such_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    weights = torch.load(saved / 'epoch_2.pth', weights_only=True)['state_dict']
    for wrapper in (SAM, PLAIN, None):
        training = {} if wrapper else {'train_dataloader': None, 'train_cfg': None}
        runner = make_runner(tmp_path / 'test', wrapper, load_from=str(saved / 'epoch_2.pth'), **training)
        assert np.isfinite(runner.test()['mean'])
        assert torch.equal(runner.model.linear.weight, weights['linear.weight'])


def test_resuming_without_the_hook_starts_an_empty_log(saved: Path) -> None:
    runner = make_runner(saved, PLAIN, resume=True, load_from=str(saved / 'epoch_1.pth'))
    with record_warnings(runner) as lines:
        runner.train()
    assert any('not HistoryBuffer' in line for line in lines)
    assert len(runner.message_hub.log_scalars['train/loss'].data[0]) == 2


def test_other_hooks_see_their_own_objects(tmp_path: Path) -> None:
    class Keeper(Hook):
        priority = 'VERY_HIGH'
        loaded: Any = None

        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint['keeper'] = {'array': np.arange(3)}

        def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint['keeper']['array']

    make_runner(tmp_path, custom_hooks=[Keeper()]).train()
    keeper = Keeper()
    make_runner(tmp_path, custom_hooks=[keeper], resume=True).train()
    np.testing.assert_array_equal(keeper.loaded, np.arange(3))


def test_ema_is_saved_and_resumed(tmp_path: Path) -> None:
    make_runner(tmp_path, custom_hooks=[EMAHook()]).train()
    assert 'ema_state_dict' in torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    make_runner(tmp_path, custom_hooks=[EMAHook()], resume=True, train_cfg={'by_epoch': True, 'max_epochs': 3}).train()
    assert (tmp_path / 'epoch_3.pth').is_file()


def test_unknown_object_is_saved_with_one_warning(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    runner.message_hub.update_info('plan', Fraction(1, 3))
    with record_warnings(runner) as lines:
        runner.train()
    named = [line for line in lines if 'Fraction' in line]
    assert len(named) == 1, 'two checkpoints were saved, one warning is enough'
    assert "checkpoint['message_hub'] holds a " in named[0]
    assert '--trust-checkpoint' in named[0]
    loaded = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert loaded['message_hub']['runtime_info']['plan'] == Fraction(1, 3)


# MMPose's own tool, which knows of us by custom_imports alone

MODULE = """
import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS

@MODELS.register_module()
class TinyNet(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.linear(inputs).square().mean())

@DATASETS.register_module()
class TinyPoints(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((4,), float(index)))
"""
CONFIG = """
custom_imports = dict(imports=['mm_sharp', 'tiny_module'])
default_scope = 'mmengine'
model = dict(type='TinyNet')
train_dataloader = dict(dataset=dict(type='TinyPoints'), batch_size=2, sampler=dict(type='DefaultSampler'),
                        collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=True, max_epochs=EPOCHS)
optim_wrapper = dict(type='SAMOptimWrapper', optimizer=dict(type='SGD', lr=0.01))
work_dir = 'work'
"""


@pytest.mark.slow
def test_tool_of_mmpose(tmp_path: Path) -> None:
    package = find_spec('mmpose')
    if package is None or package.origin is None:
        pytest.skip('mmpose is not installed')
    tool = Path(package.origin).parent / '.mim' / 'tools' / 'train.py'
    (tmp_path / 'tiny_module.py').write_text(MODULE)
    outputs = []
    for epochs, options in [(1, []), (2, ['--resume'])]:
        (tmp_path / 'config.py').write_text(CONFIG.replace('EPOCHS', str(epochs)))
        done = subprocess.run(
            [sys.executable, str(tool), 'config.py', *options],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1'},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        torch.load(tmp_path / 'work' / f'epoch_{epochs}.pth', weights_only=True)
        outputs.append(done.stdout + done.stderr)
    assert 'resumed epoch: 1, iter: 2' in outputs[1]
    assert 'not HistoryBuffer' not in outputs[1]
