"""The tools run on the toy of tests.toys, in this process: what they do, print and return."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mmengine.config import Config

from mm_sharp.cli import options as cli
from tests.conftest import ROOT
from tests.toys import toy_config

SGD = dict(type='SGD', lr=0.01, momentum=0.9)
OPTIM_WRAPPERS: dict[str, dict[str, Any]] = {
    'sam': dict(type='SAMOptimWrapper', rho=0.05, optimizer=SGD),
    'esam-history': dict(type='ESAMOptimWrapper', selection='history', refresh=2, optimizer=SGD),
    'ausam': dict(type='AUSAMOptimWrapper', sampling_ratio=0.5, optimizer=SGD),
    'plain': dict(type='OptimWrapper', optimizer=SGD),
}
_numbers = itertools.count()


def tool(name: str) -> ModuleType:
    """tools/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f'{name}_tool', ROOT / 'tools' / f'{name}.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_toy(path: Path, wrapper: str = 'sam', **changes: Any) -> Path:
    """A config file of the toy, two epochs with a checkpoint after each; with a test of three numbers."""
    config = toy_config(
        path.parent / 'unused',
        custom_imports=dict(imports=['mm_sharp', 'tests.toys', 'tests.toy_metric']),
        optim_wrapper=copy.deepcopy(OPTIM_WRAPPERS[wrapper]),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)),
    )
    config['test_dataloader'] = {**copy.deepcopy(config['train_dataloader']), 'sampler': dict(type='DefaultSampler')}
    config.update(test_cfg={}, test_evaluator=dict(type='ToyMetric'))
    if wrapper == 'plain':
        config['custom_hooks'] = []
    config.update(copy.deepcopy(changes))
    # Whoever runs it in this process gives it a name of its own.
    del config['work_dir'], config['experiment_name']
    Config(config).dump(str(path))
    return path


class Tools:
    """Runs ``tools/*.py`` as ``python tools/train.py …`` does, but for the process.

    Args:
        folder: They are run in.
        patch: Puts back what they change.
        capture: Reads what they print; without it nobody does.

    Attributes:
        printed: What the last run wrote to stdout.
    """

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str] | None = None
    ) -> None:
        self._patch, self._capture = patch, capture
        self._folder = folder
        self.printed = ''

    def __call__(self, name: str, *arguments: object, code: int = 0, lines: int | None = 1) -> str:
        """Run a tool.

        Returns:
            What it wrote to stderr, which has one line if it failed.
        """
        experiment = f'experiment_name=tool-run-{next(_numbers)}'
        options = [str(argument) for argument in arguments]
        if '--cfg-options' not in options:
            options.append('--cfg-options')
        with self._patch.context() as patch:
            patch.chdir(self._folder)
            patch.setattr(sys, 'argv', [f'tools/{name}.py', *options, experiment])
            patch.setattr('mm_sharp.compat.checkpoint_hook._in_every_run', False)
            self._read()
            found = cli.run_tool(tool(name).main)
        self.printed, errors = self._read()
        assert found == code, errors
        if code and lines is not None:
            assert len(errors.splitlines()) == lines, errors
        return errors

    def _read(self) -> tuple[str, str]:
        return ('', '') if self._capture is None else tuple(self._capture.readouterr())


SAM = ROOT / 'configs' / 'demo' / 'simcc_res18-half_sam_demo-128x96.py'


PLAIN = ROOT / 'configs' / 'demo' / 'simcc_res18-half_demo-128x96.py'


def run(command: str, *arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a tool as a user does, from another folder than the repository's."""
    interpreter = [] if command.endswith('.sh') else [sys.executable]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable}
    environment.pop('PYTHONPATH', None)
    done = subprocess.run(
        [*interpreter, ROOT / command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def configure(name: str, *arguments: object) -> Config:
    """The config that a tool ends up with."""
    module = tool(name)
    return module.configure(module.parse_arguments([str(argument) for argument in arguments]))
