"""A recipe's float model with a checkpoint's weights, and what it is calibrated with and judged by."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cached_property
from numbers import Real
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import track_iter_progress
from torch import nn
from torch.utils.data import DataLoader, Subset

from mm_sharp.analysis.post_training.policies import float_config, quantized_config
from mm_sharp.analysis.prepare import build_loader, model_config, prepared, seeded
from mm_sharp.analysis.sharpness.loading import load_model, load_samples
from mm_sharp.analysis.sharpness.objective import batch_loss, loss_form
from mm_sharp.cli.loading import careful_loading
from mm_sharp.errors import UsageError, UserError, did_you_mean
from mm_sharp.quantization import calibrate
from mm_sharp.quantization.calibration import is_error
from mm_sharp.quantization.calibration_hook import some_batches
from mm_sharp.quantization.equalization import equalize
from mm_sharp.quantization.learned_rounding import check_scales_stay
from mm_sharp.quantization.record import LAYOUT, QuantizationRecord, quantized_record

Judge = Callable[[nn.Module], float]  # the lower the better
_BATCH = 32  # people


class Subject:
    """What is quantized after training: the model of a recipe, quantized or not, with a float model's checkpoint.

    It is calibrated with so many training ``batches``, those of ``CalibrationHook`` with this seed, which is that of
    their augmentation, too. A UserError: the checkpoint is a quantized model's, another's, or not plain (``trust``).
    """

    def __init__(self, cfg: Config, checkpoint: str, trust: bool = False, batches: int = 16, seed: int = 0) -> None:
        self.cfg, self._batches, self._seed = float_config(cfg), batches, seed
        with careful_loading(trust):
            content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
        self._state: dict[str, Any] = content.get('state_dict', content)
        if LAYOUT in self._state:
            raise UserError(f"'{checkpoint}' is of a quantized model: take the float model's, which it started from")
        self.float_model = load_model(self.cfg, checkpoint, trust)[0].eval()

    @cached_property
    def batches(self) -> list[Any]:
        """The batches to calibrate with, the same for all policies."""
        with seeded(self._seed), prepared(self.cfg):
            loader = some_batches(build_loader(self.cfg), self._batches, self._seed)
            return list(with_bar(loader, 'Loading training batches'))

    @cached_property
    def test_loader(self) -> Any:
        """The config's test data."""
        with prepared(self.cfg):
            return Runner.build_dataloader(deepcopy(dict(self.cfg.test_dataloader)))

    def quantized(self, policy: Mapping[str, Any], **options: Any) -> nn.Module:
        """The model in evaluation mode, calibrated by a policy; ``options`` are those of ``calibrate``."""
        with prepared(self.cfg):
            model = _build(self.cfg, policy, self._state).to(get_device())
            calibrate(model, with_bar(self.batches, 'Calibrating'), **options)
        return model

    def test(self, model: nn.Module) -> dict[str, float]:
        """The metrics of ``tools/test.py``, but for their parts (``coco/AP .5``)."""
        loader = self.test_loader
        with prepared(self.cfg):
            evaluator = Evaluator(deepcopy(self.cfg.test_evaluator))
            evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
            with torch.no_grad():
                for batch in with_bar(loader, f'Testing on {len(loader.dataset)} samples'):
                    evaluator.process(data_samples=model.test_step(batch), data_batch=batch)  # type: ignore[operator]
            with redirect_stdout(io.StringIO()):  # COCO's own tables
                metrics = evaluator.evaluate(len(loader.dataset))
        return {name: float(value) for name, value in metrics.items() if isinstance(value, Real) and ' ' not in name}

    def loss(self, people: int, *, at_most: bool = False) -> tuple[Judge, int]:
        """The validation loss over the first people of a seeded shuffle, with labels as in training; and how many.

        If there are fewer, over all of them with ``at_most``, else a UsageError.
        """
        with torch.no_grad(), prepared(self.cfg):
            samples = load_samples(self.cfg, 'val', people, self._seed, option='--people', at_most=at_most)
            if len(samples) < people:
                sys.stderr.write(f'All {len(samples)} people of the validation set are judged on\n')
            preprocess: Any = self.float_model.data_preprocessor
            batches = [(count, preprocess(batch, False)) for count, batch in samples.batches(_BATCH)]
            adds_up = loss_form(self.float_model, samples, _BATCH).adds_up
        # Of sums, a smaller last batch's is smaller by itself.
        batches = [(batches[0][0] if adds_up else count, data) for count, data in batches]

        def judge(model: Any) -> float:
            with torch.no_grad(), prepared(self.cfg):
                losses = [(n, batch_loss(model, deepcopy(data))) for n, data in batches]
            return sum(n * float(loss) for n, loss in losses) / len(samples)

        return judge, len(samples)

    def metric(self, name: str, people: int) -> tuple[Judge, int]:
        """A validation metric over the first people of the set, its sign turned where higher is better; how many."""
        from mm_sharp.quantization.export_check import evaluate  # which needs onnx

        with prepared(self.cfg):
            dataset = DATASETS.build(deepcopy(dict(self.cfg.val_dataloader.dataset)))
        part = Subset(dataset, range(min(people, len(dataset))))
        batches = list(DataLoader(part, batch_size=_BATCH, collate_fn=pseudo_collate))

        def judge(model: Any) -> float:
            with torch.no_grad(), prepared(self.cfg):
                predictions = [sample for batch in batches for sample in model.test_step(deepcopy(batch))]
                values = evaluate(self.cfg.val_evaluator, dataset.metainfo, predictions)
            if name not in values:
                raise UsageError(f'--metric {name}: no metric of val_evaluator; {did_you_mean(name, values)}')
            return values[name] if is_error(name) else -values[name]

        return judge, len(part)


def check_policies(
    cfg: Config, policies: Mapping[str, Mapping[str, Any]], *, exported: bool = False, **options: Any
) -> dict[str, QuantizationRecord]:
    """Before a checkpoint is loaded, refuse policies, by name, that do not fit a config's model; a UsageError.

    With ``exported``, what cannot be exported is refused, too; ``options`` are those of ``calibrate``. Returns the
    records of the models.
    """
    records = {}
    for name, policy in policies.items():
        try:
            with prepared(cfg):
                model = _build(cfg, policy)
            records[name] = quantized_record(model)
            if exported:
                from mm_sharp.quantization.export import check_exportable

                check_exportable(model, 'qcdq')
            if options.get('learned_rounding'):
                check_scales_stay(model)
            if options.get('equalize'):
                records[name].calibrating = True  # it may run without scales
                equalize(model)
        except UserError as error:
            raise UsageError(f'--policy {name}: {error}') from error
    return records


def _build(cfg: Config, policy: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> nn.Module:
    cfg = quantized_config(cfg, policy)
    with patch.object(MMLogger.get_current_instance(), 'disabled', True):  # its table of all layers
        model: nn.Module = MODELS.build(model_config(cfg))
        if state is not None:
            model.load_state_dict(state, strict=False)
    return model.eval()


def with_bar(items: Any, title: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr below a title."""
    sys.stderr.write(f'{title}\n')
    return track_iter_progress((items, len(items)), file=sys.stderr)  # type: ignore[no-any-return]
