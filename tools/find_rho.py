#!/usr/bin/env python
"""Find a rho for a config: how far the perturbation may go before the gradient does not explain the loss any more.

python tools/find_rho.py configs/demo/simcc_res18-half_sam_demo-128x96.py
python tools/find_rho.py CONFIG --load-from CHECKPOINT --steps 0     at the weights of a checkpoint

A short training with the base optimizer comes first. Then the rise of the loss is measured for a grid of rho, all at
the same weights and batches. docs/scale.md says how to read the table, and what the proposal is worth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config

# Importing the package mends the stack; MMPose is first imported after it, when the runner is built.
from mm_sharp.analysis.find_rho import measure, report
from mm_sharp.analysis.tables import write_json
from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.compat import enable_for_all_runs
from mm_sharp.config import preflight


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a UsageError for what is out of range."""
    parser = cli.config_parser('Find a rho for a config')
    add = parser.add_argument
    add('--load-from', metavar='CHECKPOINT', help="start from these weights (default: the config's load_from)")
    add('--rho', type=cli.positive, nargs='+', help="radii to measure (default: a tenth to ten times the config's)")
    steps = 'of training before (default: 200, or half of the training if that is less)'
    add('--steps', type=cli.whole(0), help=steps)
    add('--batches', type=cli.whole(2), default=16, help='to measure on, at least 2 (default: 16)')
    near = 'how far the linearity may be from 1, and how much of the loss the rise may be (default: 0.1)'
    add('--tolerance', type=cli.positive, default=0.1, help=near)
    add('--seed', type=cli.whole(0), help="of the training (default: the config's randomness.seed, or 0)")
    add('--out-dir', default='work_dirs/find_rho', help='folder for the results (default: work_dirs/find_rho)')
    cli.add_trust(parser)
    args = parser.parse_args(arguments)
    if args.rho and len({*args.rho}) < len(args.rho):
        parser.error(f'--rho {" ".join(f"{rho:g}" for rho in args.rho)}: the same value twice')
    return args


def configure(args: argparse.Namespace) -> Config:
    """Read the config, apply the options and check the outcome; what does not fit is a UsageError."""
    cfg = cli.load_config(args)
    if args.load_from is not None:
        cfg.load_from = args.load_from
    if args.seed is not None or (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': args.seed or 0}
    preflight.check_training(cfg)
    preflight.check_data(cfg, 'train')
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from, '--load-from' if args.load_from else 'load_from', cfg.get('load_hint') or '')
    return cfg


def main(arguments: Sequence[str]) -> None:
    """Train, measure, write the files and print the table."""
    args, begin = parse_arguments(arguments), time.perf_counter()
    enable_for_all_runs()
    cfg = configure(args)
    folder = cli.output_folder(args.out_dir)
    perturbation = measure.perturbation_of(cfg)
    rhos = sorted(args.rho or perturbation.rhos())
    batches, steps = measure.measure(cfg, perturbation, rhos, args.steps, args.batches, args.trust_checkpoint)
    points, shares = report.points_of(rhos, batches), report.shares_of(batches)
    measured = perturbation.arguments, perturbation.own, perturbation.remark
    found = report.Findings(points, shares, steps, len(batches), args.tolerance, *measured)
    write_json(folder / 'find_rho.json', report.content(found))
    report.draw(folder / 'find_rho.png', found, Path(args.config).stem)
    print(report.text(found))
    print(f'Written in {time.perf_counter() - begin:.0f} s: {folder}/find_rho.json, find_rho.png')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
