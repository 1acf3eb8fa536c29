#!/usr/bin/env python
"""Write a model as ONNX, and check the file against PyTorch on pictures of the test set.

python tools/export.py CONFIG CHECKPOINT --format qcdq --benchmark
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.utils import ProgressBar
from torch import nn
from torch.utils.data import DataLoader, Subset

from mm_sharp.analysis.sharpness import loading
from mm_sharp.analysis.tables import write_json
from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the model is built.
from mm_sharp.errors import UsageError

# The package qonnx runs a graph node by node, which takes seconds a picture.
_IMAGES = {'qcdq': 64, 'qonnx': 4, 'float': 64}
_RUNTIMES = {'qcdq': 'onnxruntime', 'qonnx': 'qonnx', 'float': 'onnxruntime'}
_BATCH_SIZE = 8


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.checkpoint_parser('Write a model as ONNX, and check the file against PyTorch')
    add = parser.add_argument
    formats = (
        'qcdq: integers, for ONNX Runtime, OpenVINO and compilers; qonnx: with operators Quant, for FINN and the like; '
        'float: a float model, or a quantized one without its quantizers (default: qcdq)'
    )
    packed = (
        'store weights of at most 4 bits two in a byte, in opset 21: half the size, no less time; ONNX Runtime reads '
        'such a file from 1.23 on'
    )
    runtimes = 'measure the qcdq file beside the float one, in ONNX Runtime and, where it is installed, in OpenVINO'
    out = 'the file to write, .onnx (default: WORK_DIR/<name of the config>_<format>.onnx)'
    images = 'check on the first N people of the test set (default: 64; with qonnx, which is slow, 4)'
    add('--format', choices=[*_IMAGES], default='qcdq', help=formats)
    add('--packed', action='store_true', help=packed)
    add('--benchmark', action='store_true', help=runtimes)
    add('--out', metavar='FILE', help=out)
    add('--images', type=cli.whole(1), metavar='N', help=images)
    args = parser.parse_args(arguments)
    if args.benchmark and args.format != 'qcdq':
        parser.error('--benchmark compares qcdq with float: leave out --format')
    if args.packed and args.format != 'qcdq':
        parser.error(f'--packed is of qcdq: leave it out with --format {args.format}')
    if args.images is None:
        args.images = _IMAGES[args.format]
    if args.out is not None and Path(args.out).suffix != '.onnx':
        parser.error(f"--out '{args.out}': the name must end in .onnx")
    return args


def configure(args: argparse.Namespace) -> Config:
    """Read the config, apply the options, and check what can be before a model is built; a UserError if it is amiss."""
    cfg = cli.load_config(args)
    cli.check_packages(f'exporting to {args.format}', 'onnx', 'onnxoptimizer', _RUNTIMES[args.format], 'brevitas')
    from mm_sharp.quantization.deployment import crop_constants

    cli.require(cfg, args.config, 'there is nothing to check the export on', 'test_dataloader', 'test_evaluator')
    crop_constants(cfg.test_dataloader.dataset.get('pipeline') or [])
    preflight.check_data(cfg, 'test')
    check_checkpoint(args.checkpoint, 'checkpoint')
    cli.output_folder(Path(args.out).parent if args.out else cfg.work_dir)
    return cfg


def load_model(cfg: Config, checkpoint: str, trust: bool, file_format: str = 'qcdq', packed: bool = False) -> nn.Module:
    """The config's model with a checkpoint's weights and scales, in evaluation mode.

    Raises:
        UserError: The checkpoint is not calibrated, has not all weights, is of another model, or is not plain.
        UsageError: The model is not quantized, and the format is not ``'float'``.
    """
    from mm_sharp.quantization.export import check_exportable

    kind = preflight.type_name(cfg.model.type)
    if file_format != 'float' and kind != 'QuantizedModel':
        raise UsageError(
            f'model={kind} is a float model: write --format float, or quantize it by a fragment, '
            "as _base_ = [RECIPE, 'mm_sharp::_base_/quantization/w8a8.py']"
        )
    init_default_scope(cfg.get('default_scope') or 'mmpose')  # of the data set and its evaluators
    check = partial(check_exportable, file_format=file_format, packed=packed)
    return loading.load_model(cfg, checkpoint, trust, check)[0].cpu().eval()


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
    """Export the model without its quantizers, too, and print and write how both files compare, with a warning if
    OpenVINO is wrong about the quantized one."""
    from mm_sharp.quantization import latency

    beside = export(cfg, model, args, 'float')
    files = {'float': Path(beside.file), 'qcdq': Path(report.file)}
    found = latency.compare(files)
    print(latency.table(found))
    for name, made in (('float', beside), ('qcdq', report)):
        metrics = ', '.join(f'{metric} {value:.4f}' for metric, (_, value) in made.metrics.items() if ' ' not in metric)
        print(f'{name}: {files[name].stat().st_size / 1e6:.2f} MB, {metrics}')
    write_json(Path(report.file).with_suffix('.latency.json'), [asdict(row) for row in found])
    warning = latency.openvino_warning(files['float'], files['qcdq']) if 'openvino' in latency.installed() else ''
    if warning:
        sys.stderr.write(f'{Path(sys.argv[0]).name}: warning: {warning}\n')


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
    write_json(file, report.as_dict())
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
