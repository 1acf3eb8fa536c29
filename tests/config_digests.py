"""What MMEngine reads from config files, one digest a file.

As a program it imports MMEngine alone, reads paths from its input, a line each, and writes the digests as JSON: what
the files say where mm_sharp is not imported.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent


def digests(files: Sequence[Path]) -> dict[str, str]:
    """A digest of each file's config, or the error that it ends with.

    ``custom_imports`` are not obeyed: they are the config's own, and some packages that they name are not installed.
    """
    found = {}
    for file in files:
        try:
            text = repr(_plain(Config.fromfile(file, import_custom_modules=False)._cfg_dict))
            found[str(file)] = hashlib.sha256(text.encode()).hexdigest()
        except Exception as error:  # a few files that are shipped cannot be read
            found[str(file)] = f'{type(error).__name__}: {error}'
    return found


def digests_without_us(files: Sequence[Path]) -> dict[str, str]:
    """The same of a process that does not import mm_sharp."""
    command = [sys.executable, '-W', 'ignore', '-m', 'tests.config_digests']
    given = '\n'.join(map(str, files))
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _plain(value: Any) -> Any:
    """A value as nested tuples and text, without building what a new-style config imports lazily."""
    if isinstance(value, dict):
        return type(value).__name__, [(key, _plain(item)) for key, item in dict.items(value)]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(item) for item in value]
    if type(value).__name__ in ('LazyObject', 'LazyAttr'):
        return 'lazy', value.dump_str
    if hasattr(value, '__qualname__'):
        return value.__module__, value.__qualname__
    return repr(value)


if __name__ == '__main__':
    paths = [Path(line) for line in sys.stdin.read().splitlines()]
    json.dump(digests(paths), sys.stdout)
    if any(name.partition('.')[0] == 'mm_sharp' for name in sys.modules):
        sys.exit('mm_sharp was imported')
