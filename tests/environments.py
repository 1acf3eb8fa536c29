"""Copies of the installed packages in which something is missing or broken.

A module that is merely hidden in ``sys.modules`` still has its metadata and its files. So a test of a broken
environment runs a new interpreter on a folder of links to the installed packages, less some, plus some fakes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(torch.__file__).resolve().parents[1]


def make_environment(folder: Path, without: Sequence[str] = (), files: Mapping[str, str] | None = None) -> Path:
    """A folder with links to the installed packages.

    Args:
        folder: where to make it.
        without: names of packages to leave out, with their metadata.
        files: path in the folder -> content, for packages to fake.
    """
    folder.mkdir()
    # Some packages install a top-level `tests`, which would hide ours.
    without = [*without, 'tests']
    for entry in INSTALLED.iterdir():
        name = entry.name.lower().partition('-')[0].removesuffix('.libs').removesuffix('.py')
        if entry.suffix != '.pth' and name not in without and name != '__pycache__':
            _link(entry, folder / entry.name)
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def _link(source: Path, target: Path) -> None:
    """A link to a package, or for OpenCV a folder of links and copies: it looks beside its resolved path."""
    if source.name != 'cv2':
        target.symlink_to(source)
        return
    target.mkdir()
    for entry in source.iterdir():
        if entry.suffix == '.py':
            shutil.copy(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry)


def run_python(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter on ``environment`` and this checkout, with no other packages."""
    return subprocess.run(
        [sys.executable, '-S', '-W', 'ignore', *arguments],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith('PYTHON')},
            'PYTHONPATH': f'{environment}{os.pathsep}{ROOT}',
            'OMP_NUM_THREADS': '1',
        },
        cwd=environment,
        capture_output=True,
        text=True,
        check=False,
    )
