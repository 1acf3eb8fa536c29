"""Draws the whole data set into a folder.

Layout::

    train/NNNNNN.png  val/NNNNNN.png                    numbered from 1
    annotations/person_keypoints_{train,val}.json       COCO keypoint format
    mpii/mpii_{train,val}.json  mpii/mpii_gt_val.mat    MPII as MMPose reads it
    meta.json                                           first without, at last with ``sha256``

Each image depends on the seed, its split and its number alone: neither the number of processes that draw nor the number
of images changes any of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from mm_sharp.compat.atomic_writes import write_atomically
from mm_sharp.demo.formats import coco_annotation, coco_file, coco_image, head_box, mat_file, mpii_record
from mm_sharp.demo.scene import Person, draw_scene
from mm_sharp.demo.settings import GENERATOR_VERSION, SETTINGS, SPLITS, Settings

Task = tuple[str, int]  # the split and the number, from 0, of an image to draw
Drawn = tuple[tuple[Person, ...], str]  # the people in an image, and the SHA-256 of its pixels
_GENERATOR, _VERSION = 'mm_sharp.demo', 'generator_version'
_GROUND_TRUTH = 'mpii/mpii_gt_val.mat'
_COCO, _MPII = 'annotations/person_keypoints_{}.json', 'mpii/mpii_{}.json'
_FILES = (*(name.format(split) for split in SPLITS for name in (_COCO, _MPII)), _GROUND_TRUTH)


def make_dataset(
    out: Path | str,
    train: int = 2048,
    val: int = 256,
    seed: int = 0,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
    settings: Settings = SETTINGS,
) -> bool:
    """Draw the data set into the folder ``out``; returns False if it was there already.

    Args:
        train, val: numbers of images, 1 to 999,999.
        seed: 0 <= seed < 2^32.
        workers: processes that draw; None for one per CPU core, 0 and 1 for none but this one.
        force: replace a data set of ours that was made with other arguments.
    """
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    arguments = {'train': train, 'val': val, 'seed': seed}
    # The files' names have six digits; the seed is one word of a seed sequence.
    limits = {'train': (1, 999_999), 'val': (1, 999_999), 'seed': (0, 2**32 - 1), 'workers': (0, 256)}
    for name, value in {**arguments, 'workers': workers}.items():
        low, high = limits[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f'{name}={value!r} must be a whole number in [{low}, {high}]')
    out = Path(out)
    request = {_VERSION: GENERATOR_VERSION, 'arguments': arguments, 'settings': asdict(settings)}
    meta: dict[str, Any] = json.loads(json.dumps({'generator': _GENERATOR, **request}))  # as it is read back
    if _is_there(out, meta, force):
        return False
    _write_json(out / 'meta.json', meta)
    for file in (*out.glob(f'*/{"[0-9]" * 6}.png'), *map(out.joinpath, _FILES)):
        file.unlink(missing_ok=True)
    for folder in (*SPLITS, 'annotations', 'mpii'):
        (out / folder).mkdir(exist_ok=True)
    tasks = [(split, index) for split in SPLITS for index in range(arguments[split])]
    with _mapped(functools.partial(_draw_image, out, seed, settings), tasks, workers) as results:
        drawn = list(tqdm(results, 'drawing people', len(tasks), unit='image', disable=not progress, mininterval=0.5))
    digest = hashlib.sha256()
    _write_split(out, 'train', drawn[:train], digest)
    _write_split(out, 'val', drawn[train:], digest)
    _write_json(out / 'meta.json', {**meta, 'sha256': digest.hexdigest()})
    return True


def _is_there(out: Path, meta: dict[str, Any], force: bool) -> bool:
    """Whether the data set ``meta`` is in the folder, complete; raise FileExistsError if something else must stay."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file: choose another folder with --out')
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / 'meta.json').read_text(encoding='utf-8'))
        is_ours = found['generator'] == _GENERATOR
    except (OSError, ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise FileExistsError(f'{out} holds other files than a demo data set: choose another folder with --out')
    if 'sha256' not in found:  # interrupted: worth nothing
        return False
    if any(found.get(key) != value for key, value in meta.items()) and not force:
        was, asked = (
            f'{" ".join(f"--{k} {v}" for k, v in one["arguments"].items())} (generator version {one[_VERSION]})'
            for one in (found, meta)
        )
        hint = 'pass --force to replace it, or choose another folder with --out'
        raise FileExistsError(f'{out} holds a demo data set made with {was}, not {asked}: {hint}')
    images = (f'{split}/{i + 1:06d}.png' for split in SPLITS for i in range(meta['arguments'][split]))
    return found == {**meta, 'sha256': found['sha256']} and all((out / name).is_file() for name in (*_FILES, *images))


def _write_json(path: Path, content: object) -> None:
    write_atomically((json.dumps(content) + '\n').encode(), path)


@contextmanager
def _mapped(draw: Callable[[Task], Drawn], tasks: list[Task], workers: int) -> Iterator[Iterator[Drawn]]:
    """The results of all tasks, in order, drawn here or in a pool of processes."""
    if workers <= 1:
        yield map(draw, tasks)
        return
    # On Linux a fork spares each worker the import of torch. Python 3.12 warns that threads don't survive it; the
    # workers need none. Ctrl-C is the parent's to handle; it ends the workers.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*multi-threaded, use of fork', DeprecationWarning)
            results = pool.map(draw, tasks, chunksize=8)
        yield results
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_image(out: Path, seed: int, settings: Settings, task: Task) -> Drawn:
    """Draw one image, write it, and return the rest."""
    split, index = task
    scene = draw_scene(seed, split, index, settings)
    path = out / split / coco_image(index + 1)['file_name']
    if not cv2.imwrite(str(path), cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)):
        raise OSError(f'could not write {path}')
    return scene.people, hashlib.sha256(scene.image.tobytes()).hexdigest()


def _write_split(out: Path, split: str, drawn: list[Drawn], digest: hashlib._Hash) -> None:
    """Write the annotations of a split, and add them and its pixels to the data set's digest."""
    images = [coco_image(number) for number in range(1, len(drawn) + 1)]
    people = [(image, *item) for image, (found, _) in zip(images, drawn, strict=True) for item in enumerate(found)]
    coco = coco_file(images, [coco_annotation(person, image['id'], number) for image, number, person in people])
    mpii = [mpii_record(person, image['file_name']) for image, _, person in people]
    heads = [head_box(person) for _, _, person in people]
    _write_json(out / _COCO.format(split), coco)
    _write_json(out / _MPII.format(split), mpii)
    contents: list[object] = [[[pixels for _, pixels in drawn], coco, mpii]]
    if split == 'val':
        (out / _GROUND_TRUTH).write_bytes(mat_file(mpii, heads))
        contents.append(heads)
    for content in contents:
        digest.update(json.dumps(content, separators=(',', ':')).encode())
