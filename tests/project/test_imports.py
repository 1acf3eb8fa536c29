"""The package's imports go one way, folder by folder, and importing it stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / 'mm_sharp'

# From the top of the reading order to the ground: a folder imports from itself and from those behind it.
ORDER = ('methods', 'hooks', 'step', 'samples', 'per_sample_loss', 'ops', 'compat', 'errors')
# Beside that column; what each may import besides the column and itself. Nothing in the column imports these.
BESIDE = {
    '__main__': set(),
    'analysis': {'cli', 'config', 'quantization'},
    'cli': {'config'},
    'config': set(),
    'demo': set(),
    'doctor': {'demo'},
    'moved': set(),
    'quantization': set(),
}


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth, for types alone too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(path.relative_to(ROOT).parts[: -node.level]) + '.' if node.level else ''
            names |= {f'{base}{node.module or ""}.{alias.name}'.replace('..', '.') for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    found = {name if name in FILES else name.rpartition('.')[0] for name in imported(path)}
    return {name for name in found if name.startswith('mm_sharp.')}


def folder(module: str) -> str:
    """The folder, or the single file beside the folders, that a module lies in."""
    return module.split('.')[1]


def allowed(place: str) -> set[str]:
    """What a folder may import from."""
    if place in ORDER:
        return set(ORDER[ORDER.index(place) :])
    return {place, *ORDER, *BESIDE[place]}


def test_every_file_has_a_place() -> None:
    assert {folder(module) for module in FILES if '.' in module} == {*ORDER, *BESIDE}


@pytest.mark.parametrize('place', [*ORDER, *BESIDE])
def test_imports_go_one_way(place: str) -> None:
    for module, path in FILES.items():
        if '.' in module and folder(module) == place:
            assert {folder(name) for name in own(path)} <= allowed(place), module


def test_no_ring_of_imports() -> None:
    graph = {module: own(path) - {module} for module, path in FILES.items() if '.' in module}
    # A folder's __init__ lists what lies in it; what lies in it does not read the list.
    list(TopologicalSorter(graph).static_order())


def test_the_package_imports_no_tools_configs_or_tests_and_brevitas_in_one_place() -> None:
    for module, path in FILES.items():
        tops = {name.split('.')[0] for name in imported(path)}
        quantization = module.startswith('mm_sharp.quantization')
        assert not tops & ({'tools', 'configs', 'tests'} | (set() if quantization else {'brevitas'})), module


def test_methods_never_import_each_other() -> None:
    shared = {'mm_sharp.methods', 'mm_sharp.methods.per_sample'}
    for module, path in FILES.items():
        if module.startswith('mm_sharp.methods.'):
            others = {name for name in own(path) if folder(name) == 'methods'} - shared - {module}
            assert not others, module


@pytest.mark.parametrize('module', ['mm_sharp.ops.perturbation', 'mm_sharp.ops.gradients'])
def test_the_mathematics_needs_tensors_only(module: str) -> None:
    tops = {name.split('.')[0] for name in imported(FILES[module])} - set(sys.stdlib_module_names)
    assert tops <= {'numpy', 'torch', 'mm_sharp'}


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {'mmpose', 'mmdet', 'mmcv', 'brevitas', 'matplotlib.pyplot'}
    code = f'import sys, mm_sharp; print(*{heavy} & set(sys.modules))'
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []
