#!/usr/bin/env python
"""Measure what a training step costs with each method, side by side, or what parts of it cost alone.

python tools/benchmark.py configs/demo/simcc_res18-half_demo-128x96.py --batch-size 32 64 --rounds 60 --threads 1 \\
    --methods base sam esam esam-history ausam ausam-0.5 --out table.json --plot table.png
python tools/benchmark.py CONFIG --amp             all methods under autocast to bfloat16, or --amp float16
python tools/benchmark.py CONFIG --peers           also SAM as it is written by hand, and pytorch_optimizer's
python tools/benchmark.py CONFIG --floors          also each method's passes alone: what its own work comes to
python tools/benchmark.py --parameters 25M 100M    climb and restoration alone, against the copy bandwidth
python tools/benchmark.py --history 10M            a sample history: memory, look-up, save and load
python tools/benchmark.py --host --threads 1       steps of a model of 3,164 weights: the host's own time

For each batch size: a table of step times, of ratios to the base optimizer in the same round, of the limits by
arithmetic and of peak memory; and one of the shares of a step's phases. A config that quantizes its model gets a row
more: the base optimizer on the float model. On the CPU the base optimizer under autocast is MMEngine's plain wrapper
with autocast around it, since MMEngine's own for mixed precision refuses the CPU; and peak memory is that of the
tensors alive, since torch keeps no count of its own there. The process keeps the memory that it frees (glibc's
mallopt): else giving it back and getting it again falls on the methods by chance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mm_sharp.analysis import benchmark
from mm_sharp.cli import options as cli
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError

_FACTORS = {'': 1, 'k': 1e3, 'M': 1e6, 'B': 1e9}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if sum(map(bool, (args.config, args.history, args.parameters, args.host))) != 1:
        parser.error('give one of a CONFIG, --parameters COUNT, --history SAMPLES and --host')
    for option in ('batch_size', 'rounds', 'warmup', 'threads'):
        given = getattr(args, option)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                parser.error(f'--{option.replace("_", "-")} {value}: it must be at least 1')
    for option, suffix in (('out', '.json'), ('plot', '.png')):
        name = getattr(args, option)
        if name is not None and Path(name).suffix != suffix:
            parser.error(f"--{option} '{name}': the name must end in {suffix}")
    if args.plot and not args.config:
        parser.error('--plot draws the table of a CONFIG')
    return args


def _parser() -> cli.OneLineParser:
    parser = cli.OneLineParser(description='Measure the cost of a training step, or of parts of it')
    parser.add_argument('config', nargs='?', help='config file of a training run')
    parser.add_argument(
        '--methods',
        nargs='+',
        default=list(benchmark.METHODS),
        metavar='METHOD',
        help=f'of {", ".join(benchmark.METHODS)}, or ausam-RATIO as ausam-0.5 (default: all but that)',
    )
    parser.add_argument('--peers', action='store_true', help="also SAM by hand, and pytorch_optimizer's if installed")
    parser.add_argument('--floors', action='store_true', help="also each method's passes alone, without its own work")
    parser.add_argument(
        '--batch-size', type=int, nargs='+', metavar='N', help="samples a step; several, several tables (the config's)"
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=['bfloat16', 'float16'],
        help="autocast for all methods (default: the config's precision; without a value: bfloat16)",
    )
    parser.add_argument(
        '--rounds', type=int, default=20, help='timed steps of each method; whole refresh cycles if any (default: 20)'
    )
    parser.add_argument('--warmup', type=int, default=3, help='steps of each method before them (default: 3)')
    parser.add_argument('--threads', type=int, help='threads of torch on the CPU')
    parser.add_argument(
        '--parameters', nargs='+', metavar='COUNT', help='measure climb and restoration alone: 25M 100M 1B'
    )
    parser.add_argument('--history', metavar='SAMPLES', help='measure a sample history instead: 10M, 500k or 20000')
    parser.add_argument('--host', action='store_true', help="measure the host's own time, on a model of 3,164 weights")
    parser.add_argument('--out', metavar='FILE', help='write the figures to a file (.json)')
    parser.add_argument('--plot', metavar='FILE', help='draw the tables as bars (.png)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=cli.CfgOptions, default={}, metavar='KEY=VALUE', help='change the config'
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of usage errors')
    # What cli.load_config reads besides; it knows another --amp.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser


def parse_count(text: str, option: str = '--history') -> int:
    """A number like 20000, 500k, 10M or 1B.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kMB]?)', text)
    count = float(match[1]) * _FACTORS[match[2]] if match else 0.0
    if count < 1 or count != int(count):
        raise UsageError(f'{option} {text}: it must be a whole number of at least 1, as 20000, 500k, 10M or 1B')
    return int(count)


def configure(args: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]]]:
    """Read the config and check it.

    Returns:
        The config, and the optimizer wrapper's config of each method by name.

    Raises:
        UsageError: Something is missing or does not fit.
    """
    methods = benchmark.parse_methods(args.methods)
    cfg = cli.load_config(args)
    preflight.check_wrappers(cfg)
    if not cfg.get('train_dataloader'):
        raise UsageError(f"'{args.config}' has no train_dataloader: there is nothing to train on")
    preflight.check_data(cfg, 'train')
    settings = {method.name: benchmark.wrapper_settings(cfg, method, args.amp) for method in methods}
    if args.peers:
        sam = benchmark.wrapper_settings(cfg, benchmark.METHODS['sam'], args.amp)
        peers, missing = benchmark.check_peers(sam)
        settings.update(dict.fromkeys(peers, sam))
        if missing:
            print(missing)
    return cfg, settings


def measure_steps(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Time the steps of all methods; returns the tables and the figures."""
    cfg, settings = configure(args)
    batch_sizes = args.batch_size or [cfg.train_dataloader.get('batch_size')]
    if not all(batch_sizes):
        raise UsageError('the config has no train_dataloader.batch_size: give --batch-size')
    keeps = benchmark.keep_freed_memory()
    tables = []
    for batch_size in dict.fromkeys(batch_sizes):
        table = benchmark.measure_table(cfg, settings, batch_size, args.rounds, args.warmup, floors=args.floors)
        tables.append(table)
        if table.rounds != args.rounds:
            print(f'--rounds {args.rounds} becomes {table.rounds}: whole refresh cycles')
    if args.plot is not None:
        of = ', '.join(filter(None, (machine()['device'], f'{torch.get_num_threads()} threads', args.amp)))
        benchmark.draw_chart(tables, Path(args.plot), f'{Path(args.config).stem}\n{of}')
    figures = {'config': args.config, 'amp': args.amp, 'warmup': args.warmup, 'keeps_freed_memory': keeps, **machine()}
    text = '\n\n'.join(table.text() for table in tables)
    return text, {**figures, 'tables': [table.figures() for table in tables]}


def measure_climb(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure climb and restoration; returns the table and the figures."""
    counts = [parse_count(text, '--parameters') for text in args.parameters]
    costs = [benchmark.measure_climb(count, args.rounds, torch.device(get_device())) for count in counts]
    figures = [{**asdict(cost), 'share_of_copy': cost.share} for cost in costs]
    return benchmark.climb_table(costs), {**machine(), 'parameters': figures}


def measure_history(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure a sample history; returns the table and the figures."""
    samples = parse_count(args.history)
    costs = [benchmark.measure_history(samples, kind) for kind in ('dense', 'sparse')]
    return benchmark.history_table(costs), {**machine(), 'history': [asdict(cost) for cost in costs]}


def measure_host(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure the host's own time of a step; returns the table and the figures."""
    methods = benchmark.parse_methods(args.methods)
    rows = benchmark.measure_host(methods, args.rounds, args.warmup, torch.device(get_device()))
    return benchmark.step_table(rows), {**machine(), 'host': [asdict(row) for row in rows]}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else f'{get_device()} ({platform.machine()})'
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    return {'device': device, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(), **versions}


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and write the figures."""
    args = parse_arguments(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    kinds = {'parameters': measure_climb, 'history': measure_history, 'host': measure_host, 'config': measure_steps}
    table, figures = next(measure for option, measure in kinds.items() if getattr(args, option))(args)
    print(table)
    print(f'{figures["device"]}, {figures["cores"]} cores, {figures["threads"]} threads, torch {figures["torch"]}')
    if args.out is not None:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(figures, indent=2, default=str) + '\n')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
