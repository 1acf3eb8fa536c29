"""Fashion-MNIST of the accuracy study: which pictures, which labels are flipped, and a training through MMPretrain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from numpy.typing import NDArray

from mm_sharp.analysis.study.fashion_mnist import FlippedFashionMNIST
from tests.conftest import ROOT

COUNTS = {'train': 200, 't10k': 40}
# MMPretrain reads the files into memory that cannot be written to.
pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')


def write_idx(file: Path, values: NDArray[np.uint8]) -> None:
    """The format of the set: a magic number, the sizes, the bytes."""
    sizes = np.array([0x0800 + values.ndim, *values.shape], dtype='>u4')
    file.write_bytes(sizes.tobytes() + values.tobytes())


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files, with pictures that are their own number."""
    folder = tmp_path_factory.mktemp('fashion-mnist')
    for name, count in COUNTS.items():
        numbers = np.arange(count)
        pictures = np.broadcast_to(numbers.astype(np.uint8)[:, None, None], (count, 28, 28))
        write_idx(folder / f'{name}-images-idx3-ubyte', np.ascontiguousarray(pictures))
        write_idx(folder / f'{name}-labels-idx1-ubyte', (numbers % 10).astype(np.uint8))
    return folder


def test_rows_and_flipped_labels(folder: Path) -> None:
    clean = FlippedFashionMNIST(str(folder), download=False, start=100, count=100)
    flipped = FlippedFashionMNIST(str(folder), download=False, start=100, count=100, flipped=0.2)
    assert [int(clean[row]['img'][0, 0]) for row in range(100)] == [*range(100, 200)]
    labels, changed = clean.get_gt_labels(), flipped.get_gt_labels()
    assert labels.tolist() == [row % 10 for row in range(100, 200)]
    assert (labels != changed).sum() == 20
    assert set(changed) <= set(range(10))
    with pytest.raises(ValueError, match=r"flipped=2 is not allowed.*type='FlippedFashionMNIST', flipped=0\.2"):
        FlippedFashionMNIST(str(folder), download=False, flipped=2)


@pytest.mark.parametrize(
    'name', ['lenet5_fashion-mnist', 'lenet5_aug_fashion-mnist', 'resnet18-quarter_aug_fashion-mnist']
)
def test_a_training(folder: Path, tmp_path: Path, name: str) -> None:
    cfg = Config.fromfile(ROOT / 'configs' / 'study' / f'{name}.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(folder)
    cfg.train_dataloader.dataset.count = 64
    cfg.val_dataloader.dataset.update(start=64, count=64)
    cfg.optim_wrapper.update(type='AUSAMOptimWrapper', sampling_ratio=0.5)
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    cfg.update(work_dir=str(tmp_path), log_level='ERROR', experiment_name=tmp_path.name, randomness=dict(seed=0))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    assert len(runner.optim_wrapper.history) == 64
