#!/usr/bin/env python
"""Find which layers of a trained model bear few bits, and propose bits for each within a budget.

python tools/sensitivity.py CONFIG CHECKPOINT --policy w4a4 w8a8 --mean-bits 6
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the model is built.


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.checkpoint_parser('Find which layers of a trained model bear few bits')
    add, whole = parser.add_argument, cli.whole
    policies = 'what layers may be quantized by: fragments of configs/_base_/quantization, or files like them, or float'
    add('--policy', nargs='+', default=['w4a4', 'w8a8'], metavar='NAME', help=f'{policies} (default: w4a4 w8a8)')
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument('--alone', action='store_true', help='one layer quantized, all others float (default)')
    spared = 'one layer as the other policies say, or float if there is none; all others as the first policy says'
    modes.add_argument('--spared', action='store_true', help=spared)
    add('--metric', help='judge by this metric of val_evaluator (default: by the validation loss)')
    add('--people', type=whole(1), default=128, help='judge on so many of the validation set (default: 128)')
    add('--batches', type=whole(1), default=16, help='training batches to calibrate with (default: 16)')
    add('--seed', type=whole(0), default=0, help='of the choice of samples (default: 0)')
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        '--size-mb', type=cli.positive, help='propose a policy with which the model takes at most so many MB'
    )
    budgets.add_argument('--mean-bits', type=cli.positive, help='propose one with at most so many bits a weight')
    args = parser.parse_args(arguments)
    names = args.names = [Path(name).stem for name in args.policy]
    if len({*names}) < len(names):
        parser.error(f'--policy {" ".join(args.policy)}: two of them have the same name')
    if names == ['float']:
        parser.error('--policy float: give at least one that quantizes, as --policy w4a4')
    if args.spared and names[0] == 'float':
        parser.error('--policy: with --spared the first is what all other layers are quantized by, and cannot be float')
    return args


def configure(args: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]]]:
    """Read the config and the policies, float left out; a UsageError for what is missing or does not fit."""
    from mm_sharp.analysis.post_training.policies import read_policy
    from mm_sharp.analysis.post_training.proposal import same_everywhere

    cfg = cli.load_config(args)
    needed = ('train_dataloader', 'val_dataloader', *(['val_evaluator'] if args.metric else []))
    cli.require(cfg, args.config, 'it calibrates on training and judges on validation data', *needed)
    names = [name for name in args.policy if name != 'float']
    policies = {Path(name).stem: same_everywhere(read_policy(name)) for name in names}
    preflight.check_data(cfg, 'train', 'val')
    check_checkpoint(args.checkpoint, 'checkpoint')
    return cfg, policies


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, write the files, and propose a policy."""
    args = parse_arguments(arguments)
    cfg, policies = configure(args)
    from mm_sharp.analysis.post_training import report
    from mm_sharp.analysis.post_training.proposal import config_text, propose
    from mm_sharp.analysis.post_training.sensitivity import FLOAT, MixedModel, measure
    from mm_sharp.analysis.post_training.subject import Subject

    folder = cli.output_folder(cfg.work_dir)
    subject = Subject(cfg, args.checkpoint, args.trust_checkpoint, args.batches, args.seed)
    judge = subject.metric(args.metric, args.people) if args.metric else subject.loss(args.people)
    measured = f'-{args.metric}' if args.metric else 'validation loss'
    mixed = MixedModel({name: subject.quantized(policy) for name, policy in policies.items()})
    others = args.names[0] if args.spared else FLOAT
    tried = args.names if len(args.names) > 1 or not args.spared else [*args.names, FLOAT]
    found = measure(mixed, tried, others, judge)
    report.write_json(folder / 'sensitivity.json', found, mixed.weights, {**vars(args), 'measured': measured})
    report.draw(folder / 'sensitivity.png', found, measured)
    budget = {'size_mb': args.size_mb, 'mean_bits': args.mean_bits}
    proposal = None
    if any(value is not None for value in budget.values()):
        proposal = propose(subject, mixed, found, policies, tried, judge, **budget)
    print(f'\n{report.table(found, mixed.weights, proposal.choice if proposal else None)}')
    print(f'\n{measured} with all layers {found.others}: {found.value:.5g}')
    if proposal:
        given = ' '.join(f'--{name.replace("_", "-")} {v:g}' for name, v in budget.items() if v is not None)
        text = config_text(proposal.policy, f'Proposed by tools/sensitivity.py for {given}.')
        (folder / 'mixed.py').write_text(text, encoding='utf-8')
        print(f'\n{report.candidates(proposal, measured)}\n\n{text}\nWritten: {folder}/mixed.py')
    print(f'Written: {folder}/sensitivity.json, sensitivity.png')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
