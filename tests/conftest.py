"""Fixtures that every test file shares."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import mm_sharp  # noqa: F401  # before any test file imports MMEngine: see mm_sharp.compat.yapf_grammar
from mm_sharp.errors import UsageError, UserError
from tests.reliability import holds, pytest_addoption

__all__ = ['ROOT', 'holds', 'pytest_addoption']
pytest_plugins = ['pytester']

# Hypothesis would fail tests that are slow here and now.
settings.register_profile('no clock', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('no clock')

ROOT = Path(__file__).resolve().parent.parent

# Files that take ten seconds and more: begun last, one of them would keep a core busy alone.
_FIRST = (
    *('test_tools', 'test_fsdp', 'test_history_hook', 'test_distributed', 'test_distributed_runs', 'test_export'),
    *('test_export_tool', 'test_quantization_build', 'test_quantization_checkpoints', 'test_quantization_sharpness'),
    *('test_quantization_sharpness_runs', 'test_quantization_calibration', 'test_quantization_calibration_hook'),
    *('test_qat_configs', 'test_mmpose_heads', 'test_classification', 'test_benchmark', 'test_bad_configs'),
    # Under `make test-slow`.
    *('test_real_quantized', 'test_resume', 'test_compat_environments', 'test_soak', 'test_rank_faults'),
    *('test_study_runs', 'test_ausam_statistics', 'test_wheel', 'test_targets', 'test_backbones', 'test_ausam_authors'),
    *('test_distillation_hook', 'test_post_training_tools', 'test_draw_keypoints', 'test_inference', 'test_lsp'),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; within a file, and among the others, everything stays in its order."""
    items.sort(key=lambda item: item.path.stem not in _FIRST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what trains in float16 on the CPU where torch cannot."""
    try:
        return (yield)
    except (UserError, UsageError) as error:
        if 'on the CPU needs torch 2.3' in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """The folder with a few real COCO and MPII images; the test is skipped where it is absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not (folder / 'coco' / 'test_coco.json').is_file():
        pytest.skip(f'no real images: {folder} is absent (it is not part of the project)')
    return folder


@pytest.fixture(scope='session', autouse=True)
def _one_thread() -> None:
    """The tests' models are too small for several threads, and each core has a test process of its own."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def _the_same_second() -> Iterator[None]:
    """Every run of a process begins in the same second, as all may on a fast machine.

    MMEngine names runs by the second, and keeps the logger, message hub and visualizer of each name for as long as the
    process lives: runs that do not have names of their own fail here, on every machine.
    """
    import mmengine._strategy.base
    import mmengine.runner.runner

    with pytest.MonkeyPatch.context() as patch:
        for module in (mmengine.runner.runner, mmengine._strategy.base):
            patch.setattr(module, 'time', _StandingClock)
        yield


class _StandingClock:
    """What MMEngine's runners use of the module ``time``."""

    strftime, localtime = staticmethod(time.strftime), staticmethod(time.localtime)

    @staticmethod
    def time() -> float:
        """Noon of 1 January 2001, UTC."""
        return 978350400.0


@pytest.fixture(scope='session', autouse=True)
def _installed_packages_stay() -> Iterator[None]:
    """MMEngine looks a package up once, not anew for every config that inherits from it.

    Each time, it would import pkg_resources again and read the 155 files in which MMPose lists its models. What runs in
    a process of its own still does.
    """
    from mmengine.config import config, utils

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((config, 'is_installed'), (config, 'get_installed_path'), (utils, 'load')):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope='session', autouse=True)
def _garbage_stays() -> Iterator[None]:
    """MMEngine's data sets have all garbage collected when they are built, which takes longer than the rest of it."""
    from mmengine.dataset import base_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_dataset, 'gc', SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope='session', autouse=True)
def _configs_as_they_are_written() -> Iterator[Callable[..., tuple[str, bool]]]:
    """A Runner writes its config out four times; formatting it neatly takes longer than training a toy.

    The text is the same Python otherwise. ``neat_configs`` has it formatted, as do runs in processes of their own; and
    of the environment, which goes into the log beside it, a process is asked once.
    """
    from mmengine.config import config
    from mmengine.runner import runner

    with pytest.MonkeyPatch.context() as patch:
        original = config.FormatCode
        patch.setattr(config, 'FormatCode', lambda text, **options: (text, False))
        patch.setattr(runner, 'collect_env', functools.cache(runner.collect_env))
        yield original


@pytest.fixture
def neat_configs(_configs_as_they_are_written: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are formatted, as they are outside the tests."""
    monkeypatch.setattr('mmengine.config.config.FormatCode', _configs_as_they_are_written)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def spare_the_garbage_collector() -> Iterator[None]:
    """Between files, what is left of models and modules is put out of the collector's sight.

    Quantized models and MMPose's registries are of hundreds of thousands of objects, which every full collection of the
    files after would look through.
    """
    yield
    _forget_runs()
    gc.collect()
    gc.freeze()


def _forget_runs() -> None:
    """Let go of what MMEngine keeps by runs' names, which those of another file may bear too."""
    from mmengine.logging import MMLogger
    from mmengine.utils import ManagerMixin

    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            handler.close()
    kinds: list[type[ManagerMixin]] = [ManagerMixin]
    for kind in kinds:
        kind._instance_dict.clear()
        kinds += kind.__subclasses__()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let fixtures know whether their test has passed."""
    report = yield
    if report.when == 'call':
        item.passed = report.passed  # type: ignore[attr-defined]
    return report


@pytest.fixture
def loading_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that loading logs."""
    messages: list[str] = []
    monkeypatch.setattr('mm_sharp.step.checkpoint.print_log', lambda message, **_: messages.append(message))
    return messages
