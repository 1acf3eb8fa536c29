"""The doctor's verdict on broken environments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mm_sharp import doctor
from mm_sharp.doctor import Problem, diagnose, parse
from tests.environments import make_environment, run_python

# The pinned environment, in which nothing is wrong.
GOOD = {
    'python': '3.11.7',
    'mm_sharp': '0.2.0',
    'torch': '2.13.0+cpu',
    'torchvision': '0.28.0',
    'mmengine': '0.10.7',
    'mmcv-lite': '2.1.0',
    'mmdet': '3.3.0',
    'mmpose': '1.3.2',
    'numpy': '1.26.4',
    'opencv-python-headless': '4.11.0.86',
    'setuptools': '80.10.2',
    'xtcocotools': '1.14.3',
    'faster-coco-eval': '1.8.0',
    'brevitas': '0.13.4',
}


def test_nothing_wrong() -> None:
    assert diagnose(GOOD) == []
    assert diagnose({**GOOD, 'brevitas': None}) == []
    assert diagnose({**GOOD, 'setuptools': None}) == [], 'mm_sharp does without'
    assert diagnose({**GOOD, 'numpy': '2.2.0'}) == [], 'faster-coco-eval stands in'
    assert diagnose({**GOOD, 'python': '3.12.1', 'xtcocotools': None}) == []
    assert diagnose({**GOOD, 'mmcv-lite': None, 'mmcv': '2.1.0'}) == []


@pytest.mark.parametrize(
    ('change', 'essential', 'text', 'command'),
    [
        ({'python': '3.9.18'}, True, 'Python 3.9.18 is too old', 'python3.11 -m venv'),
        ({'torch': None, 'torchvision': None, 'mmpose': None}, True, 'torch is missing', 'pip install "torch>=2.1"'),
        ({'torch': '2.0.1', 'torchvision': '0.15.2'}, True, 'torch 2.0.1 is too old', 'pip install --upgrade "torch'),
        ({'mmengine': None}, True, 'mmengine is missing', 'pip install "mmengine>=0.10"'),
        ({'mmengine': '0.9.1'}, True, 'mmengine 0.9.1 is too old', 'pip install --upgrade "mmengine>=0.10"'),
        ({'torchvision': None}, True, 'torchvision is missing', 'pip install torchvision'),
        ({'torchvision': '0.16.2'}, False, 'belongs to another torch', '"torchvision==0.28.*"'),
        ({'mmpose': None}, False, 'mmpose is missing', 'pip install --no-deps mmpose==1.3.2'),
        ({'mmcv-lite': None}, True, 'mmcv is missing', 'pip install "mmcv-lite>=2.0.0,<2.2.0"'),
        ({'mmcv': '2.1.0'}, True, 'both installed', 'pip uninstall -y mmcv mmcv-lite &&'),
        ({'mmcv-lite': '2.2.0'}, True, 'mmcv-lite 2.2.0 is too new for mmdet 3.3.0', '"mmcv-lite>=2.0.0,<2.2.0"'),
        ({'mmcv-lite': None, 'mmcv': '2.2.0'}, True, 'mmcv 2.2.0 is too new', '"mmcv>=2.0.0,<2.2.0"'),
        ({'mmdet': None}, False, 'mmdet is missing', '"mmdet>=3.0.0,<3.4.0"'),
        ({'opencv-python-headless': None}, True, 'OpenCV is missing', '"opencv-python-headless<4.12"'),
        ({'opencv-python-headless': '4.12.0.88'}, True, 'needs numpy 2', '"opencv-python-headless<4.12"'),
        ({'opencv-python': '4.11.0.86'}, False, 'several builds of OpenCV', 'pip uninstall -y opencv-python opencv'),
        ({'numpy': '2.2.0', 'faster-coco-eval': None}, True, 'compiled against numpy 1', 'faster-coco-eval'),
        ({'xtcocotools': None, 'faster-coco-eval': None}, True, 'neither xtcocotools nor', 'pip install xtcocotools'),
    ],
    ids=str,
)
def test_one_thing_wrong(change: dict[str, str | None], essential: bool, text: str, command: str) -> None:
    problems = [p for p in diagnose({**GOOD, **change}) if re.search(text, p.text)]
    assert len(problems) == 1, diagnose({**GOOD, **change})
    assert problems[0].essential is essential
    assert command in problems[0].command


def test_python_312_needs_setuptools() -> None:
    (problem,) = diagnose({**GOOD, 'python': '3.12.1', 'setuptools': None})
    assert problem.essential
    assert 'distutils' in problem.text


def test_python_312_cannot_have_xtcocotools() -> None:
    (problem,) = diagnose({**GOOD, 'python': '3.12.1', 'xtcocotools': None, 'faster-coco-eval': None})
    assert problem.command == 'pip install faster-coco-eval'


@pytest.mark.parametrize(
    'change', [{'numpy': '2.2.0', 'opencv-python-headless': '4.12.0.88'}, {'mmdet': '3.4.0', 'mmcv-lite': '2.2.0'}]
)
def test_limits_hold_only_together(change: dict[str, str]) -> None:
    assert not [p for p in diagnose({**GOOD, **change}) if p.essential]


def test_essential_problems_come_first() -> None:
    kinds = [p.essential for p in diagnose({})]
    assert kinds == sorted(kinds, reverse=True)
    assert True in kinds


@pytest.mark.parametrize(
    ('version', 'numbers'),
    [('2.13.0+cpu', (2, 13, 0)), ('4.11.0.86', (4, 11, 0, 86)), ('2.2.0rc1', (2, 2, 0)), ('9', (9,))],
)
def test_parse(version: str, numbers: tuple[int, ...]) -> None:
    assert parse(version) == numbers


@pytest.mark.parametrize('version', ['', 'unknown', 'v1.0'])
def test_no_rule_judges_a_version_without_a_number(version: str) -> None:
    assert parse(version) == ()
    assert diagnose({**GOOD, 'torch': version or 'dev', 'setuptools': version or 'dev'}) == []


def test_versions_are_read_for_all_names() -> None:
    versions = doctor.read_versions()
    assert set(versions) == {'python', *doctor.DISTRIBUTIONS}
    assert set(doctor.OPENCV) < set(versions)
    assert None in versions.values()


def test_imports_that_fail_become_problems() -> None:
    tried = []

    def load(name: str) -> None:
        tried.append(name)
        if name == 'cv2':
            raise ImportError('libGL.so.1: cannot open\nmore')
        if name.startswith('mmpose'):
            raise RuntimeError('the same')

    problems = doctor.try_imports({**GOOD, 'brevitas': None}, load)
    assert [p.text for p in problems] == [
        'cv2 does not import (ImportError: libGL.so.1: cannot open)',
        'mmpose.datasets does not import (RuntimeError: the same)',
    ]
    assert 'opencv-python-headless' in problems[0].command
    assert problems[1].command.endswith(' mmpose')
    assert 'brevitas' not in tried
    assert 'mm_sharp.methods.sam' in tried


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, 'read_versions', lambda: GOOD)
    monkeypatch.setattr(doctor, 'list_fixes', lambda: ['[active] a fix'])
    found: list[Problem] = []
    monkeypatch.setattr(doctor, 'try_imports', lambda versions: found)
    assert doctor.main() == 0
    assert 'No problems found.' in capsys.readouterr().out
    found.append(Problem('a note', 'do this', essential=False))
    assert doctor.main() == 0
    found.append(Problem('a break', 'do that'))
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert 'BROKEN  a break\n          do that' in text
    assert '[active] a fix' in text


def test_torch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail() -> Any:
        raise OSError('libcudart.so.12')

    monkeypatch.setattr(torch.cuda, 'is_available', fail)
    assert doctor.describe_devices() == 'unknown (OSError)'


def test_devices_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: f'GPU {index}')
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    assert doctor.describe_devices() == 'CUDA 12.8: GPU 0, GPU 1'


def test_command_without_torch(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / 'site', without=['torch', 'torchvision', 'mmpose', 'setuptools'])
    done = run_python(environment, '-m', 'mm_sharp.doctor')
    assert done.returncode == 1
    assert 'Traceback' not in done.stdout + done.stderr
    assert 'BROKEN  torch is missing' in done.stdout
    assert 'pip install "torch>=2.1"' in done.stdout
    assert 'cannot be listed' in done.stdout


@pytest.mark.slow
def test_command_with_the_base_alone(tmp_path: Path) -> None:
    missing = ['mmpose', 'mmcv', 'mmcv_lite', 'mmdet', 'mmpretrain', 'torchvision']
    missing += ['xtcocotools', 'faster_coco_eval', 'brevitas']
    environment = make_environment(tmp_path / 'site', without=missing)
    done = run_python(environment, '-m', 'mm_sharp.doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in done.stdout + done.stderr
    assert 'note    mmpose is missing' in done.stdout
    assert '[  -   ] torchvision operators: torchvision is not installed' in done.stdout
    assert '[  -   ] mmcv operators: mmcv is not installed' in done.stdout
