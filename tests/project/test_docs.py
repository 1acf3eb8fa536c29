"""What the documentation shows is true: examples run, configs load, commands and paths exist."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from mmengine.config import Config

import mm_sharp
from mm_sharp.step.wrapper import TwoPassOptimWrapper, registered_methods
from tests.conftest import ROOT
from tests.pages import blocks

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'configs').rglob('README.md')), *sorted((ROOT / 'docs').rglob('*.md'))]
MODULES = sorted(module.name for module in pkgutil.walk_packages(mm_sharp.__path__, 'mm_sharp.'))


CONFIGS = [
    pytest.param(block, id=f'{page.relative_to(ROOT)}-{number}')
    for page in PAGES
    for number, block in enumerate(blocks(page, 'python'))
    if 'optim_wrapper' in block
]


@pytest.mark.parametrize('module', MODULES)
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_there_is_an_example() -> None:
    assert doctest.testmod(importlib.import_module('mm_sharp.methods.sam')).attempted >= 5


@pytest.mark.parametrize('block', CONFIGS)
def test_config_examples_load_and_use_a_wrapper_of_ours(block: str, tmp_path: Path) -> None:
    (tmp_path / 'example.py').write_text(block)
    config = Config.fromfile(tmp_path / 'example.py')
    assert config.optim_wrapper.type in registered_methods()
    assert 'mm_sharp' in config.custom_imports.imports
    assert config.optim_wrapper.optimizer.type, "the recipe's optimizer is gone"


def test_the_readmes_quantized_config_is_complete(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(ROOT / 'README.md', 'python') if 'quantization/' in block]
    (tmp_path / 'my_qat.py').write_text(block)
    config = Config.fromfile(tmp_path / 'my_qat.py')
    assert (config.model.type, config.model.model) == ('QuantizedModel', 'TopdownPoseEstimator')
    assert config.optim_wrapper.type == 'AUSAMOptimWrapper'
    assert config.optim_wrapper.optimizer.type, "the recipe's optimizer is gone"
    assert config.load_from == 'float.pth'


def test_the_readme_shows_both_ways_in() -> None:
    assert sum('optim_wrapper' in block for block in blocks(ROOT / 'README.md', 'python')) == 4


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r'\]\(([^)#]+)', text) if '://' not in link]
    paths = re.findall(r'(?:tools|configs|tests|mm_sharp|requirements)/[\w./-]*[\w/]', text)
    assert all((page.parent / link).exists() for link in links), links
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_readmes_tree_is_the_packages() -> None:
    (tree,) = [block for block in blocks(ROOT / 'README.md', '') if block.startswith('mm_sharp/')]
    named = set(re.findall(r'^  (\w+\.py|\w+/)', tree.split('\nconfigs/')[0], flags=re.MULTILINE))
    files = {path.name for path in (ROOT / 'mm_sharp').glob('*.py')} - {'__init__.py'}
    folders = {path.name + '/' for path in (ROOT / 'mm_sharp').iterdir() if (path / '__init__.py').is_file()}
    assert named <= files | folders
    assert files | folders <= named, 'a new folder must be in the tree'


def test_every_public_name_is_registered_or_documented() -> None:
    readme = (ROOT / 'README.md').read_text()
    for name in mm_sharp.__all__:
        assert name.startswith('__') or name in readme
    assert issubclass(mm_sharp.SAMOptimWrapper, TwoPassOptimWrapper)


def test_makefile_and_readme_run_the_same_commands() -> None:
    """The commands without make are those that make runs, with its variables filled in."""
    makefile = (ROOT / 'Makefile').read_text()
    for variable in re.findall(r'^(\w+) := (.*)$', makefile, flags=re.MULTILINE) * 3:
        makefile = makefile.replace(f'$({variable[0]})', variable[1])
    makefile = makefile.replace('$(VENV)', '.venv').replace('$(CURDIR)', '$PWD').replace('$$', '$')
    makefile = re.sub(r' --disable-pip-version-check| -q|\\\n\s*| \$\(ARGS\)', '', makefile)
    commands = [
        line.strip()
        for line in re.sub(r'\\\n\s*', '', blocks(ROOT / 'README.md', 'bash')[1]).splitlines()
        if line.startswith('.venv') and '&&' not in line
    ]
    assert len(commands) == 7
    missing = [command for command in commands if command not in makefile]
    assert not missing, missing
