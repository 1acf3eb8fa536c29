"""The package's imports go one way, and importing it stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / 'mm_sharp'

# Each module may import from its own layer's left, never from its right or from its own.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({'config_types'}),
    frozenset({'quantized_config'}),
    frozenset(
        {
            'compat',
            'fragments',
            'members',
            'perturbation',
            'quantized_perturbation',
            'random_state',
            'validation',
            'demo',
            'sample_table',
            'transfer',
        }
    ),
    frozenset({'checkpoint_check', 'finite', 'rare_changes', 'shards'}),
    frozenset({'parameters', 'gradients', 'grad_switch', 'module_state', 'precision', 'step_record', 'call_inputs'}),
    frozenset({'draws', 'ranks', 'replay', 'sampling', 'sample_history', 'forward_state'}),
    frozenset({'per_sample_loss', 'sample_keys', 'batch_draw', 'visits'}),
    frozenset({'step_watch', 'support', 'wrapper_state', 'subset', 'indexed_dataset', 'loader_draws', 'method'}),
    frozenset({'parallel_model'}),
    frozenset({'ascent', 'second_pass', 'step_guard'}),
    frozenset({'two_pass', 'dataset_keys'}),
    frozenset({'per_sample_pass'}),
    frozenset({'sam', 'esam', 'ausam', 'hooks', 'ausam_sampler'}),
    frozenset({'compilation', 'history_hook', 'resumed_draws', 'quantization'}),
)
# Command-line glue may import everything, and nothing imports it.
GLUE = frozenset(
    {
        *('benchmark', 'build_errors', 'careful_loading', 'cli', 'diagnosis', 'doctor', 'endings', 'launcher_watch'),
        *('preflight', 'runners', 'sharpness', 'study', 'training_checks', 'wrapper_checks'),
    }
)


def modules() -> dict[str, list[Path]]:
    """Source files by top-level module of the package."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        found.setdefault(parts[0], []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth but not under TYPE_CHECKING."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(path.relative_to(ROOT).parts[: -node.level]) + '.' if node.level else ''
            names |= {f'{base}{node.module or ""}.{alias.name}'.replace('..', '.') for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """The package's modules among dotted names."""
    return {name.split('.')[1] for name in names if name.startswith('mm_sharp.')}


def test_every_module_has_a_place() -> None:
    assert set(modules()) - {'__init__'} == frozenset().union(*LAYERS, GLUE)


@pytest.mark.parametrize('module', sorted(frozenset().union(*LAYERS)))
def test_imports_go_one_way(module: str) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    allowed = frozenset().union(*LAYERS[:level]) | {module}
    for path in modules()[module]:
        assert own(imported(path)) <= allowed, path


def test_nothing_imports_the_glue() -> None:
    for module, paths in modules().items():
        for path in paths:
            assert module in GLUE or not own(imported(path)) & GLUE, path


def test_the_package_imports_no_tools_configs_or_tests_and_brevitas_in_one_place() -> None:
    for module, paths in modules().items():
        for path in paths:
            tops = {name.split('.')[0] for name in imported(path)}
            foreign = {'tools', 'configs', 'tests'} | ({'brevitas'} if module != 'quantization' else set())
            assert not tops & foreign, path


@pytest.mark.parametrize('module', ['perturbation', 'gradients'])
def test_the_mathematics_needs_torch_only(module: str) -> None:
    for path in modules()[module]:
        tops = {name.split('.')[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert tops <= {'torch', 'mm_sharp'}, path


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {'mmpose', 'mmdet', 'mmcv', 'brevitas', 'matplotlib.pyplot'}
    code = f'import sys, mm_sharp; print(*{heavy} & set(sys.modules))'
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []
