"""The fixes in environments in which something is missing or broken, each in an interpreter of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.environments import make_environment, run_python

pytestmark = pytest.mark.slow

REPORT = 'import json; from mm_sharp import compat; print(json.dumps({f.name: f.active for f in compat.fixes()}))'
HEAVY = {'torchvision', 'mmcv', 'mmdet', 'mmpose', 'xtcocotools', 'faster_coco_eval', 'brevitas'}
CONFIG = 'sam/td-hm_res50_sam_8xb64-210e_coco-256x192.py'


def last_line(environment: Path, script: str) -> Any:
    """The JSON that ``script`` printed last."""
    done = run_python(environment, '-c', script)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_without_xtcocotools_and_setuptools(tmp_path: Path, shared_data: Path) -> None:
    for name in ('mmpose', 'faster_coco_eval', 'xtcocotools'):
        pytest.importorskip(name)
    missing = ['xtcocotools', 'setuptools', 'pkg_resources', '_distutils_hack', 'distutils']
    environment = make_environment(tmp_path / 'site', without=missing)
    (environment / 'user.py').write_text(f"_base_ = ['mm_sharp::{CONFIG}', 'mmpose::_base_/datasets/coco.py']\n")
    script = f"""
import json, mm_sharp, mmengine, sys
loaded = list(sys.modules)
from mm_sharp import compat
from mmengine.hub import get_config
from pathlib import Path
config = mmengine.Config.fromfile('user.py')
assert get_config('mmpose::body_2d_keypoint/simcc/coco/simcc_res50_8xb64-210e_coco-256x192.py').model
import xtcocotools, xtcocotools.mask as cocomask
from xtcocotools import cocoeval
from tests.coco_evaluation import evaluate_coco
fixes = {{fix.name: fix.active for fix in compat.fixes()}}
modules = [cocoeval.COCOeval.__module__, cocoeval.Params.__module__, cocomask.decode.__module__]
result = evaluate_coco(Path({str(shared_data)!r}))
print(json.dumps([loaded, fixes, modules, config.optim_wrapper.type, result]))
"""
    loaded, fixes, modules, wrapper, result = last_line(environment, script)
    assert not HEAVY & set(loaded), 'importing us must stay cheap'
    assert fixes['xtcocotools']
    assert fixes['pkg_resources']
    assert modules[0] == 'mm_sharp.compat.coco_stand_in'
    assert modules[2] == 'faster_coco_eval.core.mask'
    assert wrapper == 'SAMOptimWrapper'
    from tests.coco_evaluation import evaluate_coco

    assert result == pytest.approx(evaluate_coco(shared_data), abs=1e-12)


WHOLE = {
    # A full mmcv, whose operators are there, and a torchvision whose library loads.
    'mmcv/__init__.py': '',
    'mmcv/_ext.py': 'def nms():\n    return "compiled"\n',
    'mmcv/utils/__init__.py': '',
    'mmcv/utils/ext_loader.py': 'import mmcv._ext\ndef load_ext(name, funcs):\n    return mmcv._ext\n',
    'mmcv/ops/__init__.py': 'from mmcv.utils import ext_loader\nnms = ext_loader.load_ext("_ext", ["nms"]).nms\n',
    'torchvision/__init__.py': 'from . import extension, _meta_registrations\n',
    'torchvision/extension.py': 'def _has_ops():\n    return True\n',
    'torchvision/_meta_registrations.py': '',
}
BROKEN_COCO = {
    'xtcocotools/__init__.py': '',
    'xtcocotools/_mask.py': 'raise ValueError("numpy.dtype size changed, may indicate binary incompatibility")\n',
    'xtcocotools/mask.py': 'import xtcocotools._mask\n',
    'xtcocotools/coco.py': 'from . import mask\nCOCO = "real"\n',
    'xtcocotools/cocoeval.py': 'from . import mask\nCOCOeval = "real"\n',
}
REPLACED = ['mmcv', 'mmcv_lite', 'torchvision', 'xtcocotools', 'mmpose', 'mmdet']


def test_what_is_whole_is_left_alone(tmp_path: Path) -> None:
    working_coco = {**BROKEN_COCO, 'xtcocotools/_mask.py': ''}
    environment = make_environment(tmp_path / 'site', without=REPLACED, files={**WHOLE, **working_coco})
    script = (
        'import mm_sharp, mmcv.ops, torchvision, torch, xtcocotools.coco\n'
        'assert mmcv.ops.nms() == "compiled" and xtcocotools.coco.COCO == "real"\n'
        'assert not hasattr(torch.ops.torchvision, "nms")\n'
    )
    fixes = last_line(environment, script + REPORT)
    active = {name for name, active in fixes.items() if active}
    always = {'mm_sharp:: configs', 'plain checkpoints', 'atomic writes', 'yapf grammars', 'resuming FlexibleRunner'}
    assert active == always


def test_broken_xtcocotools(tmp_path: Path) -> None:
    pytest.importorskip('faster_coco_eval')
    environment = make_environment(tmp_path / 'site', without=REPLACED, files={**WHOLE, **BROKEN_COCO})
    script = (
        'import mm_sharp\nfrom xtcocotools.coco import COCO\nimport xtcocotools\n'
        'assert COCO.__module__ == "mm_sharp.compat.coco_stand_in"\n'
        'assert xtcocotools.__file__, "the package itself is the real one"\n'
        'from mm_sharp.compat import mmpose_imports\n'
        'print(json.dumps([mmpose_imports.fix_xtcocotools.reason]))'
    )
    (reason,) = last_line(environment, 'import json\n' + script)
    assert 'numpy.dtype size changed' in reason


def test_neither_xtcocotools_nor_a_stand_in(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / 'site', without=[*REPLACED, 'faster_coco_eval'])
    script = """
import json
from mm_sharp import compat
try:
    from xtcocotools.coco import COCO
except ModuleNotFoundError as error:
    print(json.dumps([str(error), {fix.name: [fix.active, fix.reason] for fix in compat.fixes()}]))
"""
    error, fixes = last_line(environment, script)
    assert error.startswith('xtcocotools is not installed')
    assert error.endswith('pip install faster-coco-eval')
    assert fixes['xtcocotools'][0] is False
    assert 'faster-coco-eval, which could stand in, is not installed' in fixes['xtcocotools'][1]
    for name in ('torchvision operators', 'mmcv operators', 'matplotlib canvas'):
        assert fixes[name][0] is False
        assert fixes[name][1].endswith('is not installed')
