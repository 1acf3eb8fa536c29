"""A few dozen pictures in the file format of CIFAR-10 and CIFAR-100 (their Python versions)."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

PER_FILE = 8


def draw_cifar10(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write ``folder/cifar-10-batches-py``: five training batches, a test batch and the names of the classes.

    Args:
        folder: What a config calls ``data_root``.
        seed: Of the generator.

    Returns:
        The MD5 sum of each file, by its name.
    """
    rng = np.random.default_rng(seed)
    batches = [*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch']
    content = {name: _pictures(rng, name, 10, 'labels') for name in batches}
    names = [f'class {number}' for number in range(10)]
    content['batches.meta'] = {'label_names': names, 'num_cases_per_batch': PER_FILE, 'num_vis': 3072}
    return _write(folder / 'cifar-10-batches-py', content)


def draw_cifar100(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write ``folder/cifar-100-python``: a training file, a test file and the names of the classes.

    Arguments and return value are those of :func:`draw_cifar10`.
    """
    rng = np.random.default_rng(seed)
    content = {
        'train': _pictures(rng, 'train', 100, 'fine_labels', count=3 * PER_FILE),
        'test': _pictures(rng, 'test', 100, 'fine_labels'),
    }
    for split in content.values():
        split['coarse_labels'] = [label // 5 for label in split['fine_labels']]
    names = {'fine_label_names': [f'class {number}' for number in range(100)]}
    content['meta'] = {**names, 'coarse_label_names': [f'group {number}' for number in range(20)]}
    return _write(folder / 'cifar-100-python', content)


def _pictures(rng: np.random.Generator, name: str, classes: int, key: str, count: int = PER_FILE) -> dict[str, Any]:
    """One file's content: noise around a grey that grows with the class, as rows of 3 x 32 x 32 bytes."""
    labels = rng.integers(0, classes, count)
    grey = 40 + 160 * labels / classes
    pictures = grey[:, None] + rng.normal(scale=20, size=(count, 3 * 32 * 32))
    return {
        'batch_label': name,
        key: labels.tolist(),
        'data': pictures.clip(0, 255).astype(np.uint8),
        'filenames': [f'{name}_{number}.png' for number in range(count)],
    }


def _write(folder: Path, content: dict[str, dict[str, Any]]) -> dict[str, str]:
    folder.mkdir(parents=True)
    sums = {}
    for name, value in content.items():
        data = pickle.dumps(value, protocol=2)  # what CIFAR's own files are written in
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return sums
