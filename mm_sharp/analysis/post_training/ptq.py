"""Post-training quantization by several policies: a checkpoint of each, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.runner.checkpoint import save_checkpoint

from mm_sharp.analysis.post_training.policies import quantized_config
from mm_sharp.analysis.post_training.subject import Subject
from mm_sharp.analysis.tables import columns
from mm_sharp.compat.plain_checkpoint import arrays_as_lists
from mm_sharp.quantization.record import quantized_record, size_in_bytes


@dataclass(frozen=True)
class Row:
    """A model's size and metrics; of a quantized one, its checkpoint and the config that goes with it."""

    name: str
    megabytes: float  # weights in their bits, all else in 4 bytes
    metrics: Mapping[str, float]
    checkpoint: str = ''
    config: str = ''


def post_train(
    subject: Subject, policies: Mapping[str, Mapping[str, Any]], folder: Path, **options: Any
) -> Iterator[Row]:
    """The float model's row, then one for each policy by name, whose model is saved as ``ptq_<name>.pth`` and ``.py``.

    ``options`` are those of :func:`mm_sharp.quantization.calibrate`.
    """
    state = subject.float_model.state_dict()
    yield Row('float', size_in_bytes(state) / 1e6, subject.test(subject.float_model))
    meta: dict[str, Any] = {'epoch': 0, 'iter': 0}
    dataset_meta = getattr(subject.test_loader.dataset, 'metainfo', None)
    if dataset_meta is not None:
        meta['dataset_meta'] = arrays_as_lists(dataset_meta)
    for name, policy in policies.items():
        model = subject.quantized(policy, **options)
        checkpoint, config = (str(folder / f'ptq_{name}{ending}') for ending in ('.pth', '.py'))
        save_checkpoint({'meta': meta, 'state_dict': model.state_dict()}, checkpoint)
        cfg = quantized_config(subject.cfg, policy)
        cfg.load_from, cfg.resume = checkpoint, False  # fine-tuning by this config starts from the model
        cfg.dump(config)
        yield Row(name, quantized_record(model).bytes() / 1e6, subject.test(model), checkpoint, config)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: name, megabytes, and the metrics that all have."""
    names = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)]
    cells = [[row.name, f'{row.megabytes:.2f}', *(f'{row.metrics[name]:.4f}' for name in names)] for row in rows]
    return columns([['', 'MB', *names], *cells])
