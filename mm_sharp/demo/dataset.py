"""Draws the whole data set into a folder, with annotations in COCO's keypoint format.

Each image depends on the seed, its split and its number alone: neither the number of processes that draw nor the number
of images changes any of them. Coordinates count from 0 at the centre of the top left pixel.
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
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from mm_sharp.compat.atomic_writes import write_atomically
from mm_sharp.demo.body import COCO_KEYPOINTS
from mm_sharp.demo.scene import Person, draw_scene
from mm_sharp.demo.settings import GENERATOR_VERSION, HEIGHT, SETTINGS, SPLITS, WIDTH, Settings

Task = tuple[str, int]  # the split and the number, from 0, of an image to draw
Drawn = tuple[tuple[Person, ...], str]  # the people in an image, and the SHA-256 of its pixels
_GENERATOR, _VERSION = 'mm_sharp.demo', 'generator_version'
_FILES = {split: f'annotations/person_keypoints_{split}.json' for split in SPLITS}
#: Pairs of keypoints, counted from 1, that are joined by a line; those of COCO.
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10], [9, 11],
    [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip


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

    ``train`` and ``val`` are numbers of images, 1 to 999,999; ``workers`` are processes that draw, None for one per CPU
    core, 0 and 1 for none but this one; with ``force``, a data set of ours with other arguments is replaced.
    """
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    arguments = {'train': train, 'val': val, 'seed': seed}
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
    for file in (*out.glob(f'*/{"[0-9]" * 6}.png'), *map(out.joinpath, _FILES.values())):
        file.unlink(missing_ok=True)
    for folder in (*SPLITS, 'annotations'):
        (out / folder).mkdir(exist_ok=True)
    tasks = [(split, index) for split in SPLITS for index in range(arguments[split])]
    with _mapped(functools.partial(_draw_image, out, seed, settings), tasks, workers) as results:
        drawn = list(tqdm(results, 'drawing people', len(tasks), unit='image', disable=not progress, mininterval=0.5))
    contents = [_write_split(out, 'train', drawn[:train]), _write_split(out, 'val', drawn[train:])]
    _write_json(out / 'meta.json', {**meta, 'sha256': hashlib.sha256(json.dumps(contents).encode()).hexdigest()})
    return True


def _is_there(out: Path, meta: dict[str, Any], force: bool) -> bool:
    """Whether the data set ``meta`` is in the folder, complete; raise FileExistsError if something else must stay."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file: choose another folder with --out')
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / 'meta.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get('generator') != _GENERATOR:
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
    return found == {**meta, 'sha256': found['sha256']} and all(
        (out / name).is_file() for name in (*_FILES.values(), *images)
    )


def _write_json(path: Path, content: object) -> None:
    write_atomically((json.dumps(content) + '\n').encode(), path)


@contextmanager
def _mapped(draw: Callable[[Task], Drawn], tasks: list[Task], workers: int) -> Iterator[Iterator[Drawn]]:
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
    split, index = task
    scene = draw_scene(seed, split, index, settings)
    path = out / split / coco_image(index + 1)['file_name']
    if not cv2.imwrite(str(path), cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)):
        raise OSError(f'could not write {path}')
    return scene.people, hashlib.sha256(scene.image.tobytes()).hexdigest()


def _write_split(out: Path, split: str, drawn: list[Drawn]) -> list[object]:
    images = [coco_image(number) for number in range(1, len(drawn) + 1)]
    annotations = [
        coco_annotation(person, image['id'], number)
        for image, (people, _) in zip(images, drawn, strict=True)
        for number, person in enumerate(people)
    ]
    category = {'id': 1, 'name': 'person', 'supercategory': 'person'}
    category |= {'keypoints': list(COCO_KEYPOINTS), 'skeleton': SKELETON}
    head = {'info': {'description': 'mm_sharp demo people', 'version': '1.0'}, 'licenses': []}
    coco = {**head, 'images': images, 'annotations': annotations, 'categories': [category]}
    _write_json(out / _FILES[split], coco)
    return [[pixels for _, pixels in drawn], coco]


def coco_image(image_id: int) -> dict[str, Any]:
    """The entry of an image; its file is named after its id."""
    return {'id': image_id, 'file_name': f'{image_id:06d}.png', 'width': WIDTH, 'height': HEIGHT}


def coco_annotation(person: Person, image_id: int, number: int) -> dict[str, Any]:
    """The annotation of person ``number`` (from 0) in an image."""
    # The id is never 0, which COCO's evaluation takes for "no match".
    head = {'id': image_id * 10 + number, 'image_id': image_id, 'category_id': 1, 'iscrowd': 0}
    body = {'bbox': list(person.box), 'area': person.area}
    count = sum(flag > 0 for _, _, flag in person.keypoints)
    return {**head, **body, 'num_keypoints': count, 'keypoints': list(chain(*person.keypoints))}
