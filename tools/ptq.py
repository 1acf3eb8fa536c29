#!/usr/bin/env python
"""Quantize a trained model without training it: a table of what that costs, and a checkpoint for each policy.

python tools/ptq.py CONFIG CHECKPOINT --policy w8a8 w4a8 w4a4 --bias-correction
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config

from mm_sharp.analysis.tables import write_json
from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the model is built.
from mm_sharp.errors import UsageError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.checkpoint_parser('Quantize a trained model without training it')
    add = parser.add_argument
    policies = 'fragments of configs/_base_/quantization, or files like them (default: what CONFIG has, else w8a8)'
    add('--policy', nargs='+', metavar='NAME', help=policies)
    add('--batches', type=cli.whole(1), default=16, help='training batches to calibrate with (default: 16)')
    add('--equalize', action='store_true', help='first equalize the ranges of channels across layers')
    add('--bias-correction', action='store_true', help="finally correct biases by the outputs' mean error")
    steps = 'learn which weights to round up, in so many steps for each layer (default: 500): minutes'
    add('--learned-rounding', type=cli.whole(1), nargs='?', const=500, default=0, metavar='STEPS', help=steps)
    add('--seed', type=cli.whole(0), default=0, help='of the choice of training samples (default: 0)')
    return parser.parse_args(arguments)


def configure(args: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]]]:
    """Read the config and the policies, and check the files that they need; a UsageError for what does not fit."""
    cli.check_packages('quantizing', 'brevitas')
    from mm_sharp.analysis.post_training.policies import own_policy, read_policy

    cfg = cli.load_config(args)
    needed = ('train_dataloader', 'test_dataloader', 'test_evaluator')
    cli.require(cfg, args.config, 'it calibrates on training data, and tests', *needed)
    own = own_policy(cfg)
    if args.policy is None and own is not None:
        policies = {'own': own}
    else:
        policies = {Path(name).stem: read_policy(name) for name in args.policy or ['w8a8']}
    if len(policies) < len(args.policy or ()):
        raise UsageError(f'--policy {" ".join(args.policy)}: two of them have the same name')
    preflight.check_data(cfg, 'train', 'test')
    check_checkpoint(args.checkpoint, 'checkpoint')
    return cfg, policies


def main(arguments: Sequence[str]) -> None:
    """Quantize, test, write the checkpoints and print the table."""
    args = parse_arguments(arguments)
    cfg, policies = configure(args)
    from mm_sharp.analysis.post_training.ptq import post_train, table
    from mm_sharp.analysis.post_training.subject import Subject, check_policies

    folder = cli.output_folder(cfg.work_dir)
    options = {name: getattr(args, name) for name in ('equalize', 'learned_rounding', 'bias_correction')}
    check_policies(cfg, policies, **options)
    subject = Subject(cfg, args.checkpoint, args.trust_checkpoint, args.batches, args.seed)
    rows = []
    for row in post_train(subject, policies, folder, **options):
        rows.append(row)
        sys.stderr.write(f'{table([row])}\n\n')
        content = {'options': {**options, 'batches': args.batches, 'seed': args.seed}, 'rows': [*map(asdict, rows)]}
        write_json(folder / 'ptq.json', content)
    print(f'\n{table(rows)}\n')
    for row in rows[1:]:
        print(f'{row.name}: test, export or fine-tune {row.checkpoint} with {row.config}')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
