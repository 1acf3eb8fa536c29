#!/usr/bin/env python
"""Find which layers of a trained model bear few bits, and propose bits for each within a budget.

python tools/sensitivity.py CONFIG CHECKPOINT --policy w4a4 w8a8 --mean-bits 6
python tools/sensitivity.py CONFIG CHECKPOINT --policy w8a8 --times-float 1.6
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config

from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.config import preflight

# Importing the package mends the stack; MMPose is first imported after it, when the model is built.

_PEOPLE = 128
_BUDGETS = {'size_mb': 0, 'mean_bits': 0, 'latency_ms': 0, 'times_float': 1}  # what they must be above


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
    people = f'judge on so many of the validation set (default: {_PEOPLE}, or all if there are fewer)'
    add('--people', type=whole(1), help=people)
    add('--batches', type=whole(1), default=16, help='training batches to calibrate with (default: 16)')
    add('--seed', type=whole(0), default=0, help='of the choice of samples (default: 0)')
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument('--size-mb', type=float, help='propose a policy with which the model takes at most so many MB')
    budgets.add_argument('--mean-bits', type=float, help='propose one with at most so many bits a weight')
    budgets.add_argument('--latency-ms', type=float, help='propose one with which a picture takes at most so long here')
    budgets.add_argument('--times-float', type=float, help='propose one at least so many times as fast as float')
    timed = 'what the two are measured in, on one thread, and the target of the proposed policy'
    default = "default: the policies' target, else onnxruntime"
    add('--runtime', choices=['onnxruntime', 'openvino'], help=f'{timed} ({default})')
    args = parser.parse_args(arguments)
    args.budget = {name: getattr(args, name) for name in _BUDGETS if getattr(args, name) is not None}
    for name, value in args.budget.items():
        if not _BUDGETS[name] < value < math.inf:
            parser.error(f'--{name.replace("_", "-")} {value:g}: it must be a finite number above {_BUDGETS[name]}')
    args.in_time = bool(args.budget.keys() & {'latency_ms', 'times_float'})
    if args.runtime and not args.in_time:
        parser.error(f'--runtime {args.runtime}: nothing is timed without --latency-ms or --times-float')
    names = args.names = [Path(name).stem for name in args.policy]
    if len({*names}) < len(names):
        parser.error(f'--policy {" ".join(args.policy)}: two of them have the same name')
    if names == ['float']:
        parser.error('--policy float: give at least one that quantizes, as --policy w4a4')
    if args.spared and names[0] == 'float':
        parser.error('--policy: with --spared the first is what all other layers are quantized by, and cannot be float')
    return args


def configure(args: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]]]:
    """Read the config and the policies, float left out, and check the files that they need.

    All policies have one target, ``args.target``, and skip the same layers.
    """
    onnx = ['onnx', 'onnxoptimizer'] if args.metric or args.in_time else []
    cli.check_packages('measuring sensitivities', 'brevitas', *onnx)
    from mm_sharp.analysis.post_training.policies import read_policy
    from mm_sharp.analysis.post_training.proposal import common_target, same_everywhere, with_common_skips

    cfg = cli.load_config(args)
    needed = ('train_dataloader', 'val_dataloader', *(['val_evaluator'] if args.metric else []))
    cli.require(cfg, args.config, 'it calibrates on training and judges on validation data', *needed)
    names = [name for name in args.policy if name != 'float']
    policies = with_common_skips({Path(name).stem: same_everywhere(read_policy(name)) for name in names})
    if args.in_time:
        from mm_sharp.analysis.post_training.latency_budget import target_of

        args.target = target_of(args.runtime, policies.values())
        cli.check_packages(f'timing for {args.target}', args.target)
    else:
        args.target = common_target(policies.values())
    if args.target != 'generic':
        policies = {name: {**policy, 'target': args.target} for name, policy in policies.items()}
    preflight.check_data(cfg, 'train', 'val')
    check_checkpoint(args.checkpoint, 'checkpoint')
    return cfg, policies


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table, write the files, and propose a policy."""
    args = parse_arguments(arguments)
    cfg, policies = configure(args)
    from mm_sharp.analysis.post_training import report
    from mm_sharp.analysis.post_training.proposal import budget_in_bits, config_text, propose
    from mm_sharp.analysis.post_training.sensitivity import FLOAT, MixedModel, measure
    from mm_sharp.analysis.post_training.subject import Subject, check_policies

    folder = cli.output_folder(cfg.work_dir)
    records = check_policies(cfg, policies, exported=args.in_time)
    subject = Subject(cfg, args.checkpoint, args.trust_checkpoint, args.batches, args.seed)
    if args.metric:
        judge, people = subject.metric(args.metric, args.people or _PEOPLE)
        judge(subject.float_model)  # is there such a metric?
    else:
        judge, people = subject.loss(args.people or _PEOPLE, at_most=args.people is None)
    measured = f'-{args.metric}' if args.metric else 'validation loss'
    others = args.names[0] if args.spared else FLOAT
    # What is proposed in time may leave layers in float.
    tried = [*args.names, *([FLOAT] if args.spared and (len(args.names) == 1 or args.in_time) else [])]
    with begun_search(args, subject, policies, judge) as search:
        # What activations between layers cost is no layer's, and is measured with the proposal.
        alone = {name: {**policy, 'target': 'generic'} for name, policy in policies.items()}
        mixed = MixedModel({name: subject.quantized(policy) for name, policy in alone.items()})
        budget = None
        if search is None and args.budget:  # refused before single layers are measured
            # No mixture has more scales than the policy that has most.
            rest = max(record.other_bytes for record in records.values())
            budget = budget_in_bits(mixed.weights, rest, policies, tried, **args.budget)
        found = measure(mixed, list(dict.fromkeys(tried)), others, judge)
        settings = {**vars(args), 'people': people, 'measured': measured}
        report.write_json(folder / 'sensitivity.json', found, mixed.weights, settings)
        report.draw(folder / 'sensitivity.png', found, measured)
        proposal = None
        if search is not None:
            proposal = search.propose(found, mixed.weights)
        elif budget is not None:
            proposal = propose(subject, mixed, found, policies, tried, judge, budget)
    print(f'\n{report.table(found, mixed.weights, proposal.choice if proposal else None)}')
    print(f'\n{measured} with all layers {found.others}: {found.value:.5g}')
    if proposal:
        ((name, value),) = args.budget.items()
        given = f'--{name.replace("_", "-")} {value:g}{f" --runtime {args.target}" if args.in_time else ""}'
        text = config_text(proposal.policy, f'Proposed by tools/sensitivity.py for {given}.')
        (folder / 'mixed.py').write_text(text, encoding='utf-8')
        print(f'\n{report.candidates(proposal, measured)}\n\n{text}\nWritten: {folder}/mixed.py')
    print(f'Written: {folder}/sensitivity.json, sensitivity.png')
    if proposal:
        print(f'\n{next_steps(args, folder / "mixed.py")}')


def next_steps(args: argparse.Namespace, policy: Path) -> str:
    """What to do with the policy that was written."""
    command = shlex.join(['python', 'tools/ptq.py', args.config, args.checkpoint, '--policy', str(policy)])
    return (
        f'Test it: {command}\n'
        f"Fine-tune with it: in a config of your own, _base_ = [the float recipe, '{policy.absolute()}'] and "
        f"load_from = '{args.checkpoint}'"
    )


@contextmanager
def begun_search(args: argparse.Namespace, subject: Any, policies: Any, judge: Any) -> Iterator[Any]:
    """A search for a policy within a budget of time, or None; its files are gone afterwards."""
    if not args.in_time:
        yield None
        return
    from mm_sharp.analysis.post_training.latency_budget import LatencyBudget, Search

    budget = LatencyBudget(args.latency_ms, args.times_float)
    with TemporaryDirectory() as folder:
        search = Search(subject, policies, budget, args.target, judge, Path(folder))
        search.start()
        yield search


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
