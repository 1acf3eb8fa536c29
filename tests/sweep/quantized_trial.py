"""One model quantized, trained for two steps by SAM, exported, and run in ONNX Runtime beside PyTorch."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import onnx
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mm_sharp.errors import UserError
from mm_sharp.quantization import QuantizationPolicy, calibrate, export, quantize
from mm_sharp.quantization.export_check import IntegerCheck, recording
from mm_sharp.quantization.export_report import EQUAL_SHARE, LARGEST_STEP, Agreement
from mm_sharp.quantization.flow import tensors_of
from mm_sharp.quantization.latency import onnxruntime_convolutions
from mm_sharp.quantization.record import quantized_record
from tests.mmpose_cases import Case
from tests.sweep.batches import Batch
from tests.sweep.quantized_backbones import SIZE, config
from tests.sweep.recipes import made_shallow
from tests.sweep.trial import seed

POLICIES: dict[str, dict[str, Any]] = {
    'W8A8': dict(weight_bit_width=8, act_bit_width=8, scale_init='max', target='onnxruntime'),
    'W4A4': dict(weight_bit_width=4, act_bit_width=4, scale_init='max'),
}
STEPS = 2
SAM = dict(type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=1e-3))

Found = dict[str, Any]


def trial(name: str) -> Found:
    """What became of a backbone.

    Returns:
        ``'refused'``, the line that says why the model cannot be quantized; or, by the names of :data:`POLICIES`, what
        :func:`_follow` has found.
    """
    init_default_scope('mmpose')
    cfg = config(name)
    with made_shallow(cfg.model):
        seed()
        model = MODELS.build(cfg.model)
    model.init_weights()
    found: Found = {'name': name}
    for policy, settings in POLICIES.items():
        try:
            quantized = quantize(deepcopy(model).train(), QuantizationPolicy.from_config(settings))
        except UserError as error:
            return {'name': name, 'refused': str(error)}
        found[policy] = _follow(quantized, _batch(model, cfg))
    return found


def _batch(model: nn.Module, cfg: Any) -> Batch:
    with torch.no_grad():
        heatmaps = tensors_of(model.eval()(torch.zeros(1, 3, *SIZE), None, mode='tensor'))[-1]
    return Case('', '', SIZE, SIZE[0] // heatmaps.shape[-1], heatmaps.shape[1]).batch(cfg)


def _follow(model: Any, batch: Batch) -> Found:
    """Calibrate, train, export and compare a quantized model."""
    record = quantized_record(model)
    found: Found = {
        'layers': [len(record.quantized), len(record.layers)],
        'batchnorms': [len(record.folded), len(record.batchnorms)],
        'reasons': sorted({*record.batchnorms.values(), *(layer.reason for layer in record.layers)} - {''}),
    }
    calibrate(model, [batch])
    with patch.object(export, 'print_log') as said:
        export.warn_of_export(model)
    wrapper = build_optim_wrapper(model, deepcopy(SAM))
    losses = [float(model.train_step(deepcopy(batch), wrapper)['loss'].detach()) for _ in range(STEPS)]
    found['trained'] = bool(torch.tensor(losses).isfinite().all()) and losses[0] != losses[1]
    if said.called:
        return {**found, 'not_exported': said.call_args.args[0].partition('will refuse it: ')[2]}
    with TemporaryDirectory() as folder:
        file = export.export_onnx(model.eval(), Path(folder, 'model.onnx'), 'qcdq', {})
        found['agrees'] = _agrees(model, file, batch)
        found['convolutions'] = onnxruntime_convolutions(file)
    return found


def _agrees(model: Any, file: Path, batch: Batch) -> bool:
    """Whether layers that are given PyTorch's integers make the same of them in ONNX Runtime."""
    inputs = model.data_preprocessor(deepcopy(batch), False)['inputs']
    check, total = IntegerCheck(onnx.load(file), 'qcdq'), Agreement()
    with torch.no_grad(), recording(model) as records:
        model(inputs, None, mode='tensor')
    check.add(inputs.numpy(), records)
    for layer in check.layers:
        total.values += layer.alone.values
        total.equal += layer.alone.equal
        total.largest = max(total.largest, layer.alone.largest)
    return total.share >= EQUAL_SHARE and total.largest <= LARGEST_STEP
