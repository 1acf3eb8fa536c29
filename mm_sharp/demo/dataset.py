"""Draws the whole data set into a folder.

Layout::

    train/NNNNNN.png  val/NNNNNN.png                    numbered from 1
    annotations/person_keypoints_{train,val}.json       COCO keypoint format
    mpii/mpii_{train,val}.json  mpii/mpii_gt_val.mat    MPII as MMPose reads it
    meta.json                                           written last

Images are drawn in several processes; each depends on the seed, its split and its number alone, so neither the
number of processes nor the number of images changes any of them.
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

from mm_sharp.demo import folder as layout
from mm_sharp.demo.formats import coco_annotation, coco_file, coco_image, head_box, mat_file, mpii_record
from mm_sharp.demo.scene import Person, draw_scene
from mm_sharp.demo.settings import GENERATOR_VERSION, SETTINGS, SPLITS, Settings

#: Six digits in the names of the files.
MAX_IMAGES = 999_999
Task = tuple[str, int]  # the split and the number, from 0, of an image to draw
Drawn = tuple[tuple[Person, ...], str]  # the people in an image, and the SHA-256 of its pixels


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

    Raises:
        FileExistsError: if ``out`` holds other files, or another data set of ours without ``force``.
        OSError: if a file can't be written.
        RuntimeError: if a worker process was killed.
    """
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    arguments = {'train': train, 'val': val, 'seed': seed}
    _check_arguments({**arguments, 'workers': workers})
    out = Path(out)
    identity = {'generator_version': GENERATOR_VERSION, 'arguments': arguments, 'settings': asdict(settings)}
    request: dict[str, Any] = json.loads(json.dumps(identity))  # in the types that JSON gives back
    if not layout.claim_folder(out, request, force=force):
        return False
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    tasks = [(split, index) for split in SPLITS for index in range(arguments[split])]
    with _mapped(functools.partial(_draw_image, out, seed, settings), tasks, workers) as results:
        drawn = list(tqdm(results, 'drawing people', len(tasks), unit='image', disable=not progress, mininterval=0.5))
    digest = hashlib.sha256()
    _write_split(out, 'train', drawn[:train], digest)
    _write_split(out, 'val', drawn[train:], digest)
    layout.finish_folder(out, {**request, 'sha256': digest.hexdigest()})
    return True


def _check_arguments(arguments: dict[str, Any]) -> None:
    limits = {'train': (1, MAX_IMAGES), 'val': (1, MAX_IMAGES), 'seed': (0, 2**32 - 1), 'workers': (0, 256)}
    for name, (low, high) in limits.items():
        value = arguments[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f'{name}={value!r} must be a whole number in [{low}, {high}]')


@contextmanager
def _mapped(draw: Callable[[Task], Drawn], tasks: list[Task], workers: int) -> Iterator[Iterator[Drawn]]:
    """The results of all tasks, in order, drawn here or in a pool of processes."""
    if workers <= 1:
        yield map(draw, tasks)
        return
    # On Linux a fork spares each worker the import of torch. Python 3.12 warns that threads don't
    # survive it; the workers need none: they do elementwise numpy and write PNG files.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    # Ctrl-C is the parent's to handle; it ends the workers.
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, signal.signal, ignore_interrupt)
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
    for name, content in ((layout.COCO[split], coco), (layout.MPII[split], mpii)):
        (out / name).parent.mkdir(exist_ok=True)
        layout.write_json(out / name, content)
    _add(digest, [[pixels for _, pixels in drawn], coco, mpii])
    if split == 'val':
        (out / layout.MPII_GROUND_TRUTH).write_bytes(mat_file(mpii, heads))
        _add(digest, heads)


def _add(digest: hashlib._Hash, content: object) -> None:
    digest.update(json.dumps(content, separators=(',', ':')).encode())
