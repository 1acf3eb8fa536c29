#!/usr/bin/env python
"""Write a model as ONNX, and check the file against PyTorch on pictures of the test set.

python tools/export.py CONFIG CHECKPOINT --format qcdq --benchmark
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils import ProgressBar
from torch import nn
from torch.utils.data import DataLoader, Subset

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import careful_loading, check_checkpoint
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the model is built.
from mm_sharp.errors import UsageError, some

# The package qonnx runs a graph node by node, which takes seconds a picture.
_IMAGES = {'qcdq': 64, 'qonnx': 4, 'float': 64}
_RUNTIMES = {'qcdq': 'onnxruntime', 'qonnx': 'qonnx', 'float': 'onnxruntime'}
_BATCH_SIZE = 8


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.checkpoint_parser('Write a model as ONNX, and check the file against PyTorch')
    parser.add_argument(
        '--format',
        choices=[*_IMAGES],
        default='qcdq',
        help='qcdq: integers, for ONNX Runtime, OpenVINO and compilers; qonnx: with operators Quant, for FINN and the '
        'like; float: a float model, or a quantized one without its quantizers (default: qcdq)',
    )
    parser.add_argument(
        '--packed',
        action='store_true',
        help='store weights of at most 4 bits two in a byte, in opset 21: half the size, no less time; ONNX Runtime '
        'reads such a file from 1.23 on',
    )
    parser.add_argument(
        '--benchmark',
        action='store_true',
        help='measure the qcdq file beside the float one, in ONNX Runtime and, where it is installed, in OpenVINO',
    )
    parser.add_argument(
        '--out', metavar='FILE', help='the file to write, .onnx (default: WORK_DIR/<name of the config>_<format>.onnx)'
    )
    parser.add_argument(
        '--images',
        type=int,
        metavar='N',
        help='check on the first N people of the test set (default: 64; with qonnx, which is slow, 4)',
    )
    args = parser.parse_args(arguments)
    if args.benchmark and args.format != 'qcdq':
        parser.error('--benchmark compares qcdq with float: leave out --format')
    if args.packed and args.format != 'qcdq':
        parser.error(f'--packed is of qcdq: leave it out with --format {args.format}')
    if args.images is None:
        args.images = _IMAGES[args.format]
    if args.images < 1:
        parser.error(f'--images {args.images}: it must be at least 1')
    if args.out is not None and Path(args.out).suffix != '.onnx':
        parser.error(f"--out '{args.out}': the name must end in .onnx")
    return args


def configure(args: argparse.Namespace) -> Config:
    """Read the config, apply the options, and check what can be checked before a model is built.

    Raises:
        UsageError: Something is missing or does not fit.
        UserError: The test pipeline is not a top-down one.
    """
    cfg = cli.load_config(args)
    cli.check_packages(f'exporting to {args.format}', 'onnx', 'onnxoptimizer', _RUNTIMES[args.format], 'brevitas')
    from mm_sharp.quantization.deployment import crop_constants

    if cfg.get('test_dataloader') is None or not cfg.get('test_evaluator'):
        raise UsageError(
            f"'{args.config}' has no test_dataloader or no test_evaluator: there is nothing to check the export on"
        )
    crop_constants(cfg.test_dataloader.dataset.get('pipeline') or [])
    preflight.check_data(cfg, 'test')
    check_checkpoint(args.checkpoint, 'checkpoint')
    cli.output_folder(Path(args.out).parent if args.out else cfg.work_dir)
    return cfg


def load_model(cfg: Config, checkpoint: str, trust: bool, file_format: str = 'qcdq', packed: bool = False) -> nn.Module:
    """Build the config's model, in evaluation mode, and load its weights and scales.

    Args:
        cfg: The config.
        checkpoint: The file.
        trust: Load it even if it is more than plain data.
        file_format: What it is to be exported as; only ``'float'`` takes models that are not quantized.
        packed: Whether its weights are to be packed.

    Raises:
        UserError: The model cannot be exported so, or the checkpoint is of another, or is not plain.
        UsageError: The checkpoint is not calibrated, or has not all weights.
    """
    from mm_sharp.quantization import check_calibrated
    from mm_sharp.quantization.export import check_exportable
    from mm_sharp.quantization.record import record_of

    init_default_scope(cfg.get('default_scope') or 'mmpose')
    with careful_loading(trust):
        model: nn.Module = MODELS.build(cfg.model)
        if file_format != 'float' and record_of(model) is None:
            raise UsageError(
                f'model={type(model).__name__} is a float model: write --format float, or quantize it by a fragment, '
                "as _base_ = [RECIPE, 'mm_sharp::_base_/quantization/w8a8.py']"
            )
        check_exportable(model, file_format, packed=packed)
        content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    try:
        keys = model.load_state_dict(content.get('state_dict', content), strict=False)
        if record_of(model) is not None:
            check_calibrated(model)
        elif keys.missing_keys:
            raise UsageError(f"'{checkpoint}' lacks weights of the config's model: {some(keys.missing_keys)}")
    except RuntimeError as error:  # torch's of shapes, ours of calibration
        raise UsageError(f"'{checkpoint}' cannot be exported: {error}") from error
    return model.eval()


def export(cfg: Config, model: nn.Module, args: argparse.Namespace, file_format: str = '') -> Any:
    """Write the file and compare it with the model; an ``ExportReport``."""
    from mm_sharp.quantization.deployment import deployment_constants
    from mm_sharp.quantization.export import export_onnx
    from mm_sharp.quantization.export_check import ExportCheck
    from mm_sharp.quantization.flow import without_quantizers

    file_format = file_format or args.format
    name = Path(args.config).stem
    file = Path(args.out or Path(cfg.work_dir, f'{name}_{args.format}.onnx'))
    if file_format != args.format:
        file = file.with_name(f'{file.stem.removesuffix(f"_{args.format}")}_{file_format}.onnx')
    dataset, batches = first_samples(cfg.test_dataloader.dataset, args.images, _BATCH_SIZE)
    pipeline = cfg.test_dataloader.dataset.get('pipeline') or []
    constants = deployment_constants(model, pipeline, dataset.metainfo, name)
    export_onnx(model, file, file_format, constants, packed=args.packed and file_format == 'qcdq')
    print(f'Written: {file} ({file.stat().st_size / 1e6:.2f} MB) and {file.with_suffix(".json")}')
    results(file).unlink(missing_ok=True)
    check = ExportCheck(model, file)
    progress = ProgressBar(min(args.images, len(dataset)))
    with without_quantizers(model) if file_format == 'float' else nullcontext():
        for batch in batches:
            progress.update(check.add(batch))
    print()
    return check.report(cfg.test_evaluator, dataset.metainfo)


def benchmark(cfg: Config, model: nn.Module, args: argparse.Namespace, report: Any) -> None:
    """Export the model without its quantizers, too, and print and write how both files compare."""
    from mm_sharp.quantization import latency

    beside = export(cfg, model, args, 'float')
    files = {'float': Path(beside.file), 'qcdq': Path(report.file)}
    found = latency.compare(files)
    print(latency.table(found))
    for name, made in (('float', beside), ('qcdq', report)):
        metrics = ', '.join(f'{metric} {value:.4f}' for metric, (_, value) in made.metrics.items() if ' ' not in metric)
        print(f'{name}: {files[name].stat().st_size / 1e6:.2f} MB, {metrics}')
    Path(report.file).with_suffix('.latency.json').write_text(
        json.dumps([asdict(row) for row in found], indent=2) + '\n', encoding='utf-8'
    )


def first_samples(dataset: Mapping[str, Any], count: int, batch_size: int) -> tuple[Any, DataLoader[Any]]:
    """A data set built from its config, and its first ``count`` samples (or all) in batches."""
    built = DATASETS.build(dict(dataset))
    part = Subset(built, range(min(count, len(built))))
    return built, DataLoader(part, batch_size=batch_size, collate_fn=pseudo_collate)


def results(file: Path) -> Path:
    """Where the comparison of an exported file is written."""
    return file.with_suffix('.check.json')


def main(arguments: Sequence[str]) -> None:
    """Export, print the comparison and write it.

    Raises:
        UsageError: Something is missing or does not fit.
        UserError: The model cannot be exported, or the checkpoint is not its.
        SystemExit: With 1, if the file and PyTorch do not agree.
    """
    args = parse_arguments(arguments)
    cfg = configure(args)
    if args.benchmark and find_spec('openvino') is None:
        sys.stderr.write('OpenVINO is not installed, and not measured: pip install mm_sharp[openvino]\n')
    model = load_model(cfg, args.checkpoint, args.trust_checkpoint, args.format, args.packed)
    report = export(cfg, model, args)
    print(report.table())
    file = results(Path(report.file))
    file.write_text(json.dumps(report.as_dict(), indent=2) + '\n', encoding='utf-8')
    print(f'\nAll layers: {file}')
    for warning in report.warnings():
        sys.stderr.write(f'{Path(sys.argv[0]).name}: warning: {warning}\n')
    if report.faults():
        sys.stderr.write(
            f'{Path(sys.argv[0]).name}: {report.file} does not agree with PyTorch: {"; ".join(report.faults())}\n'
        )
        raise SystemExit(1)
    print('The file agrees with PyTorch.')
    if args.benchmark:
        benchmark(cfg, model, args, report)


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
