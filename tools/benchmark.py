#!/usr/bin/env python
"""Measure what a training step costs with each method, side by side, or what parts of it cost alone.

python tools/benchmark.py configs/demo/simcc_res18-half_demo-128x96.py --batch-size 32 64 --rounds 60 --threads 1 \\
    --methods base sam esam esam-history ausam ausam-0.5 --out table.json
python tools/benchmark.py CONFIG --amp             all methods under autocast to bfloat16, or --amp float16
python tools/benchmark.py CONFIG --peers           also SAM as it is written by hand
python tools/benchmark.py CONFIG --floors          also each method's passes alone: what its own work comes to
python tools/benchmark.py --parameters 25M 100M    perturbation and restoration alone, against the copy bandwidth
python tools/benchmark.py --host                   steps of a model of 3,164 weights, a batch of 16, one thread: the
                                                   host's own time, as multiples of the base optimizer's;
                                                   --peers and --floors as above

A method is a registered optimizer wrapper, by its name without OptimWrapper; NAME-VALUE is the method with another
value of its first own argument of that kind, as ausam-0.5 (sampling_ratio=0.5) or esam-history (selection='history').

For each batch size: a table of step times, of ratios to the base optimizer in the same round, of theoretical costs and
of peak memory; and one of the shares of a step's phases. A config that quantizes its model gets a row more: the base
optimizer on the float model. On the CPU the peak memory is that of the tensors alive, since torch keeps no count of its
own there. The process keeps the memory that it frees (glibc's mallopt): else giving it back and getting it again falls
on the methods by chance. It takes numbers below 1e-38 for 0 (denormals): a CPU takes many times longer for those, and
how many gradients have depends on the weights that a pass is at. In its first ten steps a method copies and compares
what it only looks at later: they are not timed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mm_sharp.analysis.benchmark import candidates, steps, table, workload
from mm_sharp.analysis.tables import write_json
from mm_sharp.cli import options as cli
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError

_FACTORS = {'': 1, 'k': 1e3, 'M': 1e6, 'B': 1e9}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if sum(map(bool, (args.config, args.parameters, args.host))) != 1:
        parser.error('give one of a CONFIG, --parameters COUNT and --host')
    if args.out is not None and Path(args.out).suffix != '.json':
        parser.error(f"--out '{args.out}': the name must end in .json")
    if args.amp == 'float16' and get_device() == 'cpu':
        parser.error("--amp float16: MMEngine's AmpOptimWrapper takes no CPU: give --amp bfloat16")
    return args


def _parser() -> cli.OneLineParser:
    names = list(candidates.all_methods())
    parser = cli.config_parser('Measure the cost of a training step, or of parts of it', nargs='?')
    add, whole = parser.add_argument, cli.whole
    some = f'of {", ".join(names)} (default: all), or with another setting: ausam-0.5, esam-history'
    add('--methods', nargs='+', default=names, metavar='METHOD', help=some)
    add('--peers', action='store_true', help='also SAM by hand')
    add('--floors', action='store_true', help="also each method's passes alone, without its own work")
    add(
        '--batch-size',
        type=whole(1),
        nargs='+',
        metavar='N',
        help="samples a step; several: a table each (the config's)",
    )
    precision = "autocast for all methods (default: the config's precision; without a value: bfloat16)"
    add('--amp', nargs='?', const='bfloat16', choices=['bfloat16', 'float16'], help=precision)
    add('--rounds', type=whole(1), default=20, help='timed steps of each method; whole cycles if any (default: 20)')
    add('--warmup', type=whole(1), default=12, help='steps of each method before them (default: 12)')
    add('--threads', type=whole(1), help='threads of torch on the CPU (default: all; with --host 1)')
    add('--parameters', nargs='+', metavar='COUNT', help='measure perturbation and restoration alone: 25M 100M 1B')
    add('--host', action='store_true', help="measure the host's own time, on a model of 3,164 weights")
    add('--out', metavar='FILE', help='write the figures to a file (.json)')
    return parser


def parse_count(text: str) -> int:
    """A number like 20000, 500k, 10M or 1B; a UsageError for another."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kMB]?)', text)
    count = float(match[1]) * _FACTORS[match[2]] if match else 0.0
    if count < 1 or count != int(count):
        raise UsageError(f'--parameters {text}: it must be a whole number of at least 1, as 20000, 500k, 10M or 1B')
    return int(count)


def configure(args: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The config, and the optimizer wrapper's config of each method by name; a UsageError for what does not fit."""
    chosen = candidates.parse_methods(args.methods)
    cfg = cli.load_config(args)
    preflight.check_wrappers(cfg)
    cli.require(cfg, args.config, 'there is nothing to train on', 'train_dataloader')
    preflight.check_data(cfg, 'train')
    settings = {name: candidates.wrapper_settings(cfg, method, args.amp) for name, method in chosen.items()}
    if args.peers:
        sam = candidates.wrapper_settings(cfg, {'type': 'SAMOptimWrapper'}, args.amp)
        candidates.check_by_hand(sam)
        settings[candidates.BY_HAND] = sam
    return cfg, settings


def measure_steps(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Time the steps of all methods; returns the tables and the figures."""
    cfg, settings = configure(args)
    batch_sizes = args.batch_size or [cfg.train_dataloader.get('batch_size')]
    if not all(batch_sizes):
        raise UsageError('the config has no train_dataloader.batch_size: give --batch-size')
    keeps = steps.keep_freed_memory()
    tables = []
    for batch_size in dict.fromkeys(batch_sizes):
        found = table.measure_table(cfg, settings, batch_size, args.rounds, args.warmup, passes_only=args.floors)
        tables.append(found)
        if found.rounds != args.rounds:
            print(f'--rounds {args.rounds} becomes {found.rounds}: whole cycles')
    figures = {'config': args.config, 'amp': args.amp, 'warmup': args.warmup, 'keeps_freed_memory': keeps}
    text = '\n\n'.join(found.text() for found in tables)
    return text, {**figures, **cli.machine(), 'tables': [found.figures() for found in tables]}


def measure_perturbing(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure perturbation and restoration; returns the table and the figures."""
    counts = [parse_count(text) for text in args.parameters]
    costs = [steps.measure_perturbing(count, args.rounds) for count in counts]
    plain = [{key: q._asdict() if isinstance(q, steps.Quartiles) else q for key, q in cost.items()} for cost in costs]
    return steps.perturbing_table(costs), {**cli.machine(), 'parameters': plain}


def measure_host(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure the host's own time of a step; returns the table and the figures."""
    methods = candidates.parse_methods(args.methods)
    if args.peers:
        methods[candidates.BY_HAND] = {'type': 'SAMOptimWrapper'}
    rows = table.measure_host(methods, args.rounds, args.warmup, passes_only=args.floors)
    head = f"the host's time of a step, and its ratio to the base optimizer's; a batch of {workload.BATCH_SIZE}"
    return f'{head}\n{table.step_table(rows)}', {**cli.machine(), 'host': [row.figures() for row in rows]}


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and write the figures."""
    args = parse_arguments(arguments)
    threads = args.threads or (1 if args.host else None)
    if args.out is not None:
        cli.output_folder(Path(args.out).parent)
    if threads is not None:
        torch.set_num_threads(threads)
    kinds = {'parameters': measure_perturbing, 'host': measure_host, 'config': measure_steps}
    text, figures = next(measure for option, measure in kinds.items() if getattr(args, option))(args)
    print(text)
    print(f'{figures["device"]}, {figures["cores"]} cores, {figures["threads"]} threads, torch {figures["torch"]}')
    if args.out is not None:
        write_json(Path(args.out), figures)


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
