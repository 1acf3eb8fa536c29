"""Configs by package name, and how packages are looked up for them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
from mmengine.utils import package_utils

import mm_sharp
from mm_sharp.compat import config_names

CONFIG = 'sam/td-hm_res50_sam_8xb64-210e_coco-256x192.py'


@pytest.mark.parametrize('package', ['mmengine', 'torch', 'numpy', 'no_such_package', 'mmpose'])
def test_same_answers_as_pkg_resources(package: str) -> None:
    pytest.importorskip('pkg_resources')
    assert config_names.is_installed(package) == package_utils.is_installed(package)
    if config_names.is_installed(package):
        assert config_names.get_installed_path(package) == package_utils.get_installed_path(package)
    else:
        with pytest.raises(ModuleNotFoundError, match=f"'{package}'.*pip install"):
            config_names.get_installed_path(package)


def test_distribution_named_otherwise_than_its_module() -> None:
    if not config_names.is_installed('mmcv-lite'):
        pytest.skip('mmcv-lite is not installed')
    assert Path(config_names.get_installed_path('mmcv-lite')).name == 'mmcv'


def test_lookup_is_replaced_only_without_pkg_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType('mm_test_user')
    original = package_utils.is_installed
    module.is_installed = original  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'mm_test_user', module)
    replaced = []
    monkeypatch.setattr(config_names, '_replace', lambda old, new: replaced.append((old, new)))
    monkeypatch.setattr(config_names, 'is_present', lambda name: True)
    assert config_names.fix_lookup.patch('mmengine') is None
    assert replaced == []
    monkeypatch.setattr(config_names, 'is_present', lambda name: False)
    assert config_names.fix_lookup.patch('mmengine') is not None
    assert replaced == [
        (original, config_names.is_installed),
        (package_utils.get_installed_path, config_names.get_installed_path),
    ]


def test_replacing_reaches_those_who_imported_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted() -> None: ...
    def other() -> None: ...

    for name in ('mm_test_a', 'mm_test_b', 'unrelated_c'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules['mm_test_a'].wanted = wanted  # type: ignore[attr-defined]
    sys.modules['mm_test_b'].wanted = other  # type: ignore[attr-defined]
    sys.modules['unrelated_c'].wanted = wanted  # type: ignore[attr-defined]
    config_names._replace(wanted, print)
    assert [sys.modules[name].wanted for name in ('mm_test_a', 'mm_test_b', 'unrelated_c')] == [
        print,
        other,
        wanted,
    ]


# Configs


def test_config_inherits_ours_by_name(tmp_path: Path) -> None:
    pytest.importorskip('mmpose')
    path = Path(mm_sharp.__file__).parent / '.mim' / 'configs' / CONFIG
    (tmp_path / 'user.py').write_text(f"_base_ = ['mm_sharp::{CONFIG}']\n")
    by_name = Config.fromfile(tmp_path / 'user.py')
    assert by_name.to_dict() == Config.fromfile(path).to_dict()
    assert by_name.optim_wrapper.type == 'SAMOptimWrapper'
    assert "_scope_='mm_sharp'" not in by_name.pretty_text, 'a scope without registries would hide those of mmpose'
    assert by_name.model._scope_ == 'mmpose', 'the scope of others is kept'
    assert get_config(f'mm_sharp::{CONFIG}').to_dict() == by_name.to_dict()


def test_config_inherits_a_fragment(tmp_path: Path) -> None:
    (tmp_path / 'user.py').write_text(
        "_base_ = ['mm_sharp::_base_/sam.py']\noptim_wrapper = dict(**_base_.sharp_optim_wrapper, clip_grad=None)\n"
    )
    assert Config.fromfile(tmp_path / 'user.py').optim_wrapper.type == 'SAMOptimWrapper'


def test_missing_config(tmp_path: Path) -> None:
    (tmp_path / 'user.py').write_text("_base_ = ['mm_sharp::_base_/no_such.py']\n")
    with pytest.raises(FileNotFoundError, match=r'no_such\.py'):
        Config.fromfile(tmp_path / 'user.py')


def test_a_mmengine_that_knows_us_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = staticmethod(lambda *arguments: ('path', 'mm_sharp'))
    monkeypatch.setattr(Config, '_get_cfg_path', marker)
    monkeypatch.setitem(MODULE2PACKAGE, 'mm_sharp', 'mm_sharp')
    assert config_names.fix_scope.patch('mmengine') is None
    assert Config._get_cfg_path() == ('path', 'mm_sharp')
