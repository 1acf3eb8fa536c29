"""Names of before version 0.2 still work, and say the new one."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

import mm_sharp
from mm_sharp.moved import NEW_NAMES

# What loads Brevitas, or torch's export, takes seconds.
LIGHT = sorted(old for old, new in NEW_NAMES.items() if not new.startswith('analysis'))


@pytest.mark.parametrize('old', LIGHT)
def test_an_old_module_is_the_new_one(old: str) -> None:
    sys.modules.pop(f'mm_sharp.{old}', None)
    with pytest.warns(FutureWarning, match=rf'mm_sharp\.{old} has moved to mm_sharp\.{NEW_NAMES[old]};'):
        module = importlib.import_module(f'mm_sharp.{old}')
    assert module is importlib.import_module(f'mm_sharp.{NEW_NAMES[old]}')
    assert module.__spec__ is not None
    assert module.__spec__.name == f'mm_sharp.{NEW_NAMES[old]}'


def test_classes_are_registered_once() -> None:
    sys.modules.pop('mm_sharp.ausam', None)
    with pytest.warns(FutureWarning):
        module = importlib.import_module('mm_sharp.ausam')
    assert module.AUSAMOptimWrapper is mm_sharp.AUSAMOptimWrapper


def test_what_lies_below_an_old_package_is_found() -> None:
    with pytest.warns(FutureWarning, match=r'mm_sharp\.study\.statistics|mm_sharp\.study'):
        study = importlib.import_module('mm_sharp.study.spec')
    assert study is importlib.import_module('mm_sharp.analysis.study.spec')


def test_names_of_modules_that_are_packages_now() -> None:
    with pytest.warns(FutureWarning, match=r'mm_sharp\.cli\.load_config has moved'):
        from mm_sharp.cli import load_config
    from mm_sharp.cli import options
    from mm_sharp.hooks import SharpnessHook

    assert load_config is options.load_config
    assert SharpnessHook is mm_sharp.SharpnessHook
    with pytest.raises(ImportError):
        from mm_sharp.cli import no_such_name  # noqa: F401  # type: ignore[attr-defined]


def test_new_names_say_nothing_and_wrong_ones_are_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        importlib.import_module('mm_sharp.methods.ausam')
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('mm_sharp.no_such_module')
