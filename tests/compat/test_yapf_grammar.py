"""yapf's cache of grammars, torn as it is while another process writes it: ``import mm_sharp`` works all the same."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_sharp.compat import yapf_grammar
from tests.conftest import ROOT

pytest.importorskip('yapf')
IMPORT = 'import mm_sharp, yapf; print(yapf.yapf_api.FormatCode("x = {  1:2 }")[0])'


def run(cache: Path, script: str) -> subprocess.CompletedProcess[str]:
    """``script`` with its user's cache folder at ``cache``."""
    environment = {**os.environ, 'XDG_CACHE_HOME': str(cache)}
    command = [sys.executable, '-c', script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that yapf keeps, by their paths in the cache folder."""
    cache = tmp_path_factory.mktemp('cache')
    assert run(cache, 'import yapf').returncode == 0
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob('*.pickle')}


def write(cache: Path, cached: dict[str, bytes], share: float) -> None:
    """The cache with the first ``share`` of every file."""
    for name, content in cached.items():
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.slow
def test_a_torn_cache(tmp_path: Path, cached: dict[str, bytes]) -> None:
    assert len(cached) == 2
    write(tmp_path, cached, 0.0)
    without = run(tmp_path, 'import yapf')
    assert 'EOFError' in without.stderr, 'yapf copes by itself: mm_sharp.compat.yapf_grammar is needed no more'
    done = run(tmp_path, IMPORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'x = {1: 2}'
    # It is whole again, for programs that do without us.
    assert run(tmp_path, 'import yapf').returncode == 0


@pytest.mark.parametrize('share', [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_torn_anywhere(cached: dict[str, bytes], share: float) -> None:
    forced: list[bool] = []

    def load_grammar(gt: str, force: bool = False, **options: Any) -> Any:
        forced.append(force)
        return gt if force else [pickle.loads(content[: int(len(content) * share)]) for content in cached.values()]

    assert yapf_grammar.tolerant(load_grammar)('Grammar.txt', save=True) == 'Grammar.txt'
    assert forced == [False, True]


def test_other_errors_pass() -> None:
    def load_grammar(gt: str, **options: Any) -> Any:
        raise PermissionError(gt)

    with pytest.raises(PermissionError):
        yapf_grammar.tolerant(load_grammar)('Grammar.txt')
