"""The wheel and the source archive: what they bring, and that it works in an environment without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mm_sharp
from tests.environments import ROOT, make_environment

pytestmark = pytest.mark.slow

MAKE_DIST = '-m hatchling build -d dist'
CONFIG = 'simcc_res18-half_sam_demo-128x96.py'


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """What a program prints to stdout and stderr."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def build(source: Path, folder: Path) -> tuple[Path, Path]:
    """Build the wheel and the source archive as ``make dist`` does, but into ``folder``."""
    run(sys.executable, *MAKE_DIST.split()[:-1], folder, cwd=source)
    wheel, archive = sorted(folder.iterdir())
    assert (wheel.suffix, archive.name[-7:]) == ('.whl', '.tar.gz')
    return wheel, archive


@pytest.fixture(scope='module')
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkout's wheel, and the source archive's."""
    pytest.importorskip('hatchling')
    folder = tmp_path_factory.mktemp('dist')
    ours, archive = build(ROOT, folder / 'ours')
    with tarfile.open(archive) as file:
        file.extractall(folder, filter='data')
    return ours, build(folder / archive.name[:-7], folder / 'theirs')[0]


@pytest.fixture(scope='module')
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a virtual environment with nothing but the source archive's wheel."""
    folder = tmp_path_factory.mktemp('user') / 'venv'
    venv.create(folder, symlinks=True)
    programs = folder / 'bin'
    pip = (sys.executable, '-m', 'pip', '--python', programs / 'python')
    run(*pip, 'install', '--no-deps', '--no-index', wheels[1], cwd=folder)
    return programs


@pytest.fixture(scope='module')
def package(installed: Path) -> Path:
    """The installed package, in an environment with the whole stack; mim, too, puts folder and name together."""
    (site,) = installed.parent.glob('lib/python*/site-packages')
    (site / 'stack.pth').write_text(f'{make_environment(installed.parent / "stack", without=["mm_sharp"])}\n')
    return site / 'mm_sharp'


def test_the_wheel_has_what_a_user_runs(wheels: tuple[Path, Path]) -> None:
    assert f'$(PY) {MAKE_DIST}\n' in (ROOT / 'Makefile').read_text()
    with zipfile.ZipFile(wheels[0]) as ours, zipfile.ZipFile(wheels[1]) as theirs:
        contents = [{info.filename: info.CRC for info in file.infolist()} for file in (ours, theirs)]
    assert contents[0] == contents[1], 'a file is missing from the source archive'
    files = [path for folder in ('configs', 'tools') for path in (ROOT / folder).rglob('*') if path.is_file()]
    brought = {f'mm_sharp/.mim/{path.relative_to(ROOT)}' for path in files if '__pycache__' not in path.parts}
    metadata = f'mm_sharp-{mm_sharp.__version__}.dist-info'
    brought |= {'mm_sharp/py.typed', 'mm_sharp/.mim/model-index.yml', f'{metadata}/top_level.txt'}
    assert not brought - set(contents[0])


def test_the_command_lists_the_tools_without_torch(installed: Path, tmp_path: Path) -> None:
    tools = {path.stem.replace('_', '-') for path in (ROOT / 'tools').glob('*.py')} | {'doctor'}
    lines = run(installed / 'mm-sharp', cwd=tmp_path).splitlines()
    described = dict(line.split(maxsplit=1) for line in lines if line.startswith('  '))
    assert tools <= set(described)
    assert run(installed / 'python', '-m', 'mm_sharp', cwd=tmp_path).splitlines() == lines
    assert run(installed / 'mm-sharp', '--version', cwd=tmp_path) == f'mm_sharp {mm_sharp.__version__}\n'
    assert run(installed / 'mm-sharp', 'trian', cwd=tmp_path, code=2).endswith("did you mean 'train'?\n")


def test_the_command_starts_the_doctor_without_torch(installed: Path, tmp_path: Path) -> None:
    assert 'torch is missing' in run(installed / 'mm-sharp', 'doctor', cwd=tmp_path, code=1)


def test_mim_finds_tools_and_configs(installed: Path, package: Path, tmp_path: Path) -> None:
    """By the rules of mim: a tool lies in ``.mim/tools``, a config is found by its name, the index names files."""
    load = pytest.importorskip('modelindex.load_model_index').load
    index = load(str(package / '.mim' / 'model-index.yml'))
    index.build_models_with_collections()
    assert index.models
    for model in index.models:
        (found,) = package.rglob(Path(model.config).name)
        assert found == package / '.mim' / model.config
    where = "import importlib.util as util; print(util.find_spec('mm_sharp').origin)"
    assert run(installed / 'python', '-c', where, cwd=tmp_path) == f'{package / "__init__.py"}\n', 'not the checkout'
    # Where the help has this option, mim passes it on.
    assert '--gpus' not in (package / '.mim' / 'tools' / 'train.py').read_text()


def test_train_a_config_of_the_wheel(installed: Path, package: Path, tmp_path: Path) -> None:
    """By the command and by the name ``mm_sharp::``, then as mim does; the second run goes on with the first."""
    pytest.importorskip('mmpose')
    size = ('--train', 32, '--val', 8)
    run(installed / 'mm-sharp', 'make-demo-data', '--out', tmp_path / 'data' / 'demo', *size, cwd=tmp_path)
    loader = 'dict(batch_size=16, num_workers=0, persistent_workers=False)'
    (tmp_path / 'user.py').write_text(
        f"_base_ = ['mm_sharp::demo/{CONFIG}']\ntrain_dataloader = {loader}\nval_cfg = val_dataloader = None\n"
        'val_evaluator = None\n'
    )
    options = 'user.py --work-dir work --resume --cfg-options train_cfg.val_interval=9 train_cfg.max_epochs='
    run(installed / 'mm-sharp', 'train', *f'{options}1'.split(), cwd=tmp_path)
    tool = package / '.mim' / 'tools' / 'train.py'
    log = run(installed / 'python', tool, *f'{options}2'.split(), '--launcher', 'none', cwd=tmp_path)
    assert 'resumed epoch: 1, iter: 2' in log
    assert (tmp_path / 'work' / 'epoch_2.pth').is_file()
