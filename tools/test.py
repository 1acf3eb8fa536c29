#!/usr/bin/env python
"""Evaluate a checkpoint on the test set of a config, and draw its predictions.

python tools/test.py configs/demo/simcc_res18-half_sam_demo-128x96.py CHECKPOINT --show-dir predictions
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmengine
from mmengine.config import Config

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import careful_loading, check_checkpoint
from mm_sharp.cli.process import build_runner
from mm_sharp.compat import enable_for_all_runs
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the runner is built.

_FORMATS = ('.json', '.yaml', '.yml', '.pkl', '.pickle')


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.common_parser('Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE', help=f'write the metrics to a file ({", ".join(_FORMATS)})')
    parser.add_argument('--dump', metavar='FILE', help='write the predictions to a pickle file (.pkl, .pickle)')
    args = parser.parse_args(arguments)
    for option, file, allowed in (('--out', args.out, _FORMATS), ('--dump', args.dump, ('.pkl', '.pickle'))):
        if file is not None and Path(file).suffix not in allowed:
            parser.error(f"{option} '{file}': the name must end in {' or '.join(allowed)}")
    return args


def configure(args: argparse.Namespace) -> Config:
    """Read the config, apply the options and check the outcome; what does not fit is a UsageError."""
    cfg = cli.load_config(args)
    cli.require(cfg, args.config, 'there is nothing to test', 'test_dataloader', 'test_evaluator')
    cli.show_predictions(cfg, args)
    if args.dump is not None:
        evaluators = cfg.test_evaluator
        cfg.test_evaluator = [
            *(evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]),
            {'type': 'mmengine.DumpResults', 'out_file_path': args.dump},
        ]
    preflight.check_data(cfg, 'test')
    check_checkpoint(args.checkpoint, 'checkpoint')
    for folder in (cfg.work_dir, *(Path(file).parent for file in (args.out, args.dump) if file is not None)):
        cli.output_folder(folder)
    cfg.load_from, cfg.resume = args.checkpoint, False
    return cfg


def report(metrics: Mapping[str, float]) -> str:
    """The metrics as a table of two columns."""
    width = max(map(len, metrics), default=0)
    return '\n'.join(f'{name:<{width}}  {value:.4f}' for name, value in metrics.items())


def main(arguments: Sequence[str]) -> None:
    """Evaluate."""
    args = parse_arguments(arguments)
    enable_for_all_runs()
    cfg = configure(args)
    with careful_loading(args.trust_checkpoint):
        runner = build_runner(cfg)
        metrics = runner.test()
    if runner.rank != 0:
        return
    if args.out is not None:
        mmengine.dump(metrics, args.out)
    if args.show_dir is not None:
        print(f'Pictures: {Path(runner.work_dir, runner.timestamp, args.show_dir)}')
    print(report(metrics))


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
