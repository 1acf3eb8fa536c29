"""The folder of a data set: whose it is, whether it is complete, and clearing what is ours in it.

``unfinished.json`` is the first file that a generation writes, ``meta.json`` the last. So a folder with
``meta.json`` is complete, a folder with only the other was interrupted, and one with neither is not ours.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mm_sharp.demo.settings import SPLITS

GENERATOR = 'mm_sharp.demo'
META, UNFINISHED, PREVIEW = 'meta.json', 'unfinished.json', 'preview.png'
MPII_GROUND_TRUTH = 'mpii/mpii_gt_val.mat'


#: Where the annotations are, by split.
COCO = {split: f'annotations/person_keypoints_{split}.json' for split in SPLITS}
MPII = {split: f'mpii/mpii_{split}.json' for split in SPLITS}
_FILES = (*COCO.values(), *MPII.values(), MPII_GROUND_TRUTH)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a file of this name is always whole: under another name first."""
    part = path.with_name(path.name + '.part')
    part.write_text(json.dumps(content) + '\n', encoding='utf-8')
    part.replace(path)


def claim_folder(folder: Path, request: dict[str, Any], *, force: bool = False) -> bool:
    """Make a folder ready for a generation; False if what is asked for is there already, complete.

    ``request`` is what identifies the data set: the part of ``meta.json`` to compare. Afterwards, the folder holds
    ``unfinished.json`` and none of our other files.

    Raises:
        FileExistsError: if the folder holds something else. Nothing was changed then.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f'{folder} is a file: choose another folder with --out')
    meta = _read_own(folder / META)
    interrupted = _read_own(folder / UNFINISHED) is not None
    if meta is None and not interrupted and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f'{folder} holds other files than a demo data set: choose another folder with --out')
    if meta is not None:
        same = {key: meta.get(key) for key in request} == request
        if same and _is_whole(folder, request['arguments']):
            (folder / UNFINISHED).unlink(missing_ok=True)
            return False
        if not same and not force:
            raise FileExistsError(
                f'{folder} holds a demo data set made with {_describe(meta)}, not {_describe(request)}: '
                'pass --force to replace it, or choose another folder with --out'
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / UNFINISHED, {'generator': GENERATOR, **request})
    _clear(folder)
    return True


def finish_folder(folder: Path, meta: dict[str, Any]) -> None:
    """Declare a data set complete."""
    write_json(folder / META, {'generator': GENERATOR, **meta})
    (folder / UNFINISHED).unlink()


def _read_own(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of ours; None if there is none, or one that isn't ours."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get('generator') == GENERATOR
    return content if ours else None


def _is_whole(folder: Path, arguments: dict[str, int]) -> bool:
    """Whether every file is there (a user may have removed some)."""
    images = (f'{split}/{i + 1:06d}.png' for split in SPLITS for i in range(arguments[split]))
    return all((folder / name).is_file() for name in (*_FILES, *images))


def _describe(meta: dict[str, Any]) -> str:
    words = (f'--{name} {value} ' for name, value in meta.get('arguments', {}).items())
    return f'{"".join(words)}(generator version {meta.get("generator_version")})'


def _clear(folder: Path) -> None:
    """Remove our files, and the folders that are empty then; nothing else."""
    (folder / META).unlink(missing_ok=True)  # first: what follows is no complete data set
    images = (f'{split}/{"[0-9]" * 6}.png' for split in SPLITS)
    for pattern in (*images, *_FILES, *(f'{name}.part' for name in _FILES), PREVIEW):
        for path in folder.glob(pattern):
            path.unlink()
    for name in (*SPLITS, 'annotations', 'mpii'):
        with suppress(OSError):  # missing, or with files of others
            (folder / name).rmdir()
