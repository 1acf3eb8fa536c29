"""The fixes in the installed environment: what they patch works, what is whole they leave alone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import FlexibleRunner, Runner
from mmengine.utils.dl_utils import mmcv_full_available

from mm_sharp import compat
from mm_sharp.compat import Fix, MissingOperatorError, mmpose_imports
from mm_sharp.compat.fix import is_present
from tests.conftest import ROOT

FIXES = {fix.name: fix for fix in compat.fixes()}


def test_apply_twice_changes_nothing() -> None:
    before: tuple[Any, ...] = (list(sys.meta_path), Config._get_cfg_path)
    before += (Runner.register_hooks, FlexibleRunner.register_hooks, dict(MODULE2PACKAGE))
    compat.apply()
    after: tuple[Any, ...] = (list(sys.meta_path), Config._get_cfg_path)
    after += (Runner.register_hooks, FlexibleRunner.register_hooks, dict(MODULE2PACKAGE))
    assert after == before


def test_every_fix_says_why_and_until_when() -> None:
    declared = [path.read_text().count('\n@partial(') for path in Path(compat.__file__).parent.glob('*.py')]
    assert len(FIXES) == len(compat.fixes()) == sum(declared) > 0
    assert all(fix.reason and fix.ends_with for fix in FIXES.values())


# When a fix runs


@pytest.fixture
def install() -> Any:
    """Installs a fix for a module, which is forgotten afterwards."""
    fixes: list[Fix] = []

    def install(name: str, patch: Any, **options: Any) -> Fix:
        fixes.append(Fix('a fix', 'never', patch, before=[name], **options))
        fixes[-1].install()
        return fixes[-1]

    yield install
    for fix in fixes:
        sys.meta_path.remove(fix)
        if 'no_such' in fix.before[0]:
            sys.modules.pop(fix.before[0], None)


def test_it_runs_before_the_import(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'patched_module.py').write_text('import prepared_module')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'prepared_module', raising=False)
    calls = []

    def patch(name: str) -> str:
        calls.append(name)
        monkeypatch.setitem(sys.modules, 'prepared_module', ModuleType('prepared_module'))
        return 'it was missing'

    fix = install('patched_module', patch)
    assert (calls, fix.active, fix.reason) == ([], False, 'patched_module was not imported')
    importlib.import_module('patched_module')
    importlib.import_module('patched_module')
    assert (calls, fix.active, fix.reason) == (['patched_module'], True, 'it was missing')


def test_it_may_hand_out_a_stand_in(install: Any) -> None:
    class Loader(importlib.abc.Loader):
        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            module.answer = 42  # type: ignore[attr-defined]

    install('no_such_module_1', lambda name: 'it is missing', stand_in=Loader())
    assert importlib.import_module('no_such_module_1').answer == 42


def test_where_nothing_is_broken_the_import_goes_on(install: Any) -> None:
    fix = install('no_such_module_2', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='no_such_module_2'):
        importlib.import_module('no_such_module_2')
    assert not fix.active


def test_it_may_look_for_the_module_itself(install: Any) -> None:
    seen = []
    install('no_such_module_3', lambda name: seen.append(is_present(name)))
    assert not is_present('no_such_module_3')
    for _ in range(2):  # an import that failed may be tried again
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module('no_such_module_3')
    assert seen == [False, False]


def test_a_fix_that_fails_says_why(install: Any) -> None:
    def patch(name: str) -> None:
        raise ModuleNotFoundError('and there is nothing to stand in')

    fix = install('no_such_module_4', patch)
    with pytest.raises(ModuleNotFoundError, match='nothing to stand in'):
        importlib.import_module('no_such_module_4')
    assert (fix.active, fix.reason) == (False, 'and there is nothing to stand in')


def test_module_that_is_there_is_left_alone(install: Any) -> None:
    assert install('json', pytest.fail).reason == 'json needs no fix'
    importlib.import_module('json')


@pytest.mark.parametrize(
    ('name', 'present'), [('json', True), ('no_such', False), ('no_such.part', False), ('json.decoder', True)]
)
def test_is_present(name: str, present: bool) -> None:
    assert is_present(name) is present


def test_module_without_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'specless', ModuleType('specless'))
    monkeypatch.setattr(sys.modules['specless'], '__spec__', None)
    assert not is_present('specless')


# torchvision


def test_missing_torchvision_operator_raises_when_called() -> None:
    pytest.importorskip('torchvision')
    if not FIXES['torchvision operators'].active:
        pytest.skip("torchvision's own operators load here")
    boxes, scores = torch.zeros(1, 4), torch.zeros(1)
    for operator in (torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
        with pytest.raises(RuntimeError, match=r'torchvision::q?nms is compiled code.*Install the torchvision wheel'):
            operator(boxes, scores, 0.5)


@pytest.mark.parametrize(
    ('has_operators', 'cuda', 'hip', 'defined'),
    [(False, None, None, True), (True, None, None, False), (False, '12.8', None, False), (False, None, '6.2', False)],
)
def test_operators_are_defined_only_where_needed(
    monkeypatch: pytest.MonkeyPatch, has_operators: bool, cuda: str | None, hip: str | None, defined: bool
) -> None:
    made = []

    class Library:
        def __init__(self, *arguments: str) -> None:
            made.append(self)

        def define(self, schema: str) -> None:
            assert 'float iou_threshold' in schema

        def impl(self, *arguments: Any) -> None:
            pass

    monkeypatch.setattr(torch.library, 'Library', Library)
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(mmpose_imports, '_library', None)
    extension = SimpleNamespace(_has_ops=lambda: has_operators)
    monkeypatch.setitem(sys.modules, 'torchvision.extension', extension)  # type: ignore[arg-type]
    found = mmpose_imports.fix_torchvision.patch('torchvision._meta_registrations')
    assert len(made) == int(defined)
    assert (found is not None) is (mmpose_imports._library is not None) is defined


# torchvision of another build than torch, and a package that imports it.
MISMATCHED = {
    'torchvision/__init__.py': 'from . import extension, _meta_registrations\n',
    'torchvision/extension.py': 'def _has_ops():\n    return False\n',
    'torchvision/_meta_registrations.py': 'import torch\ntorch.library.register_fake("torchvision::nms", min)\n',
    'timm/__init__.py': 'import torchvision\n',
}
TIMM_FIRST = """
import torch
torch.version.cuda = torch.version.hip = None
try:
    import timm
except RuntimeError as error:
    print(error)
import mm_sharp, timm
print(mm_sharp.compat.mmpose_imports.fix_torchvision.reason)
"""


@pytest.mark.slow
def test_timm_before_mm_sharp_and_after_it(tmp_path: Path) -> None:
    """What is imported before us fails as ever, and not for good; the doctor's line says in which order it works."""
    for name, text in MISMATCHED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', TIMM_FIRST],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before == 'operator torchvision::nms does not exist'
    assert 'Import mm_sharp before torchvision, timm' in after
    assert before in after


# mmcv


@pytest.fixture
def lite() -> None:
    pytest.importorskip('mmcv')
    if not FIXES['mmcv operators'].active:
        pytest.skip('a full mmcv is installed')


@pytest.mark.usefixtures('lite')
def test_missing_operator_raises_when_called() -> None:
    from mmcv.ops import DeformConv2d, batched_nms

    with pytest.raises(MissingOperatorError, match=r"'nms' is compiled code.*mmcv-lite.*pip uninstall -y mmcv-lite"):
        batched_nms(torch.rand(3, 4), torch.rand(3), torch.zeros(3), {'type': 'nms', 'iou_threshold': 0.5})
    layer = DeformConv2d(3, 4, 3, padding=1)
    with pytest.raises(MissingOperatorError, match="'deform_conv_forward'"):
        layer(torch.rand(1, 3, 8, 8), torch.zeros(1, 18, 8, 8))


@pytest.mark.usefixtures('lite')
def test_operators_are_not_pretended() -> None:
    importlib.import_module('mmcv.ops')
    assert not mmcv_full_available()
    assert 'mmcv._ext' not in sys.modules


@pytest.mark.usefixtures('lite')
def test_report_of_the_environment() -> None:
    from mmcv.utils import collect_env

    assert collect_env()['MMCV Compiler'] == 'n/a'


@pytest.mark.parametrize(
    ('error', 'cause'),
    [
        (ModuleNotFoundError("No module named 'mmcv._ext'"), 'mmcv-lite has no compiled operators'),
        (ImportError('_ext.so: undefined symbol: x\nmore'), r"don't load (_ext.so: undefined symbol: x)"),
        (None, None),
    ],
)
def test_load_ext_is_replaced_only_where_needed(
    monkeypatch: pytest.MonkeyPatch, error: ImportError | None, cause: str | None
) -> None:
    original = object()
    loader = SimpleNamespace(load_ext=original)

    def load(name: str) -> Any:
        if name == 'mmcv._ext' and error is not None:
            raise error
        return loader

    monkeypatch.setattr(mmpose_imports, 'importlib', SimpleNamespace(import_module=load))
    found = mmpose_imports.fix_mmcv.patch('mmcv.ops')
    if cause is None:
        assert found is None
        assert loader.load_ext is original
        return
    assert cause in (found or '')
    extension = loader.load_ext('_ext', ['nms', 'get_compiler_version'])  # type: ignore[operator]
    assert extension.get_compiler_version() == 'n/a'
    with pytest.raises(MissingOperatorError, match="operator 'nms'"):
        extension.nms(1, offset=2)
    assert not hasattr(extension, 'roi_align'), 'only what was asked for'
