#!/usr/bin/env python
"""Measure what a training step costs with each method, side by side, or what a sample history costs.

python tools/benchmark.py configs/demo/simcc_res18-half_demo-128x96.py --batch-size 32 --rounds 100 --out table.json
python tools/benchmark.py --history 10M

A config that quantizes its model gets a row more: the base optimizer on the float model.
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

from mm_sharp import benchmark, cli, preflight


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.OneLineParser(description='Measure the cost of a training step, or of a sample history')
    parser.add_argument('config', nargs='?', help='config file of a training run')
    parser.add_argument(
        '--methods',
        nargs='+',
        default=list(benchmark.METHODS),
        metavar='METHOD',
        help=f'of {", ".join(benchmark.METHODS)}, or ausam-RATIO as ausam-0.5 (default: all but that)',
    )
    parser.add_argument('--batch-size', type=int, help="samples a step (default: the config's)")
    parser.add_argument(
        '--rounds', type=int, default=20, help='timed steps of each method; whole refresh cycles if any (default: 20)'
    )
    parser.add_argument('--warmup', type=int, default=3, help='steps of each method before them (default: 3)')
    parser.add_argument('--threads', type=int, help='threads of torch on the CPU')
    parser.add_argument('--history', metavar='SAMPLES', help='measure a sample history instead: 10M, 500k or 20000')
    parser.add_argument('--out', metavar='FILE', help='write the figures to a file (.json)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=cli.CfgOptions, default={}, metavar='KEY=VALUE', help='change the config'
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of usage errors')
    # What cli.load_config reads besides.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args(arguments)
    if (args.config is None) == (args.history is None):
        parser.error('give either a CONFIG or --history SAMPLES')
    for option in ('batch_size', 'rounds', 'warmup', 'threads'):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f'--{option.replace("_", "-")} {value}: it must be at least 1')
    if args.out is not None and Path(args.out).suffix != '.json':
        parser.error(f"--out '{args.out}': the name must end in .json")
    return args


def parse_count(text: str) -> int:
    """A number like 20000, 500k or 10M.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r'(\d+(?:\.\d+)?)([kM]?)', text)
    count = float(match[1]) * {'': 1, 'k': 1e3, 'M': 1e6}[match[2]] if match else 0.0
    if count < 1 or count != int(count):
        raise cli.UsageError(f'--history {text}: it must be a number of samples, as 20000, 500k or 10M')
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
        raise cli.UsageError(f"'{args.config}' has no train_dataloader: there is nothing to train on")
    preflight.check_data(cfg, 'train')
    return cfg, {method.name: benchmark.wrapper_settings(cfg, method) for method in methods}


def measure_steps(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Time the steps of all methods; returns the table and the figures."""
    cfg, settings = configure(args)
    batch_size = args.batch_size or cfg.train_dataloader.get('batch_size')
    if not batch_size:
        raise cli.UsageError('the config has no train_dataloader.batch_size: give --batch-size')
    limits = {name: benchmark.step_limit(cfg, own, batch_size) for name, own in settings.items()}
    cycle = max(limit.refresh for limit in limits.values())
    rounds = -(-args.rounds // cycle) * cycle
    if rounds != args.rounds:
        print(f'--rounds {args.rounds} becomes {rounds}: whole refresh cycles of {cycle} steps')
    subject = benchmark.load_subject(cfg, batch_size)
    if subject.float_model is not None:
        settings = {benchmark.FLOAT: settings['base'], **settings}
    times = subject.measure(settings, rounds, args.warmup)
    known: dict[str, Any] = {name: limits.get(name) for name in settings}
    rows = benchmark.compare(times, known, batch_size, steps_before=args.warmup)
    setting = {'config': args.config, 'batch_size': batch_size, 'rounds': rounds, 'warmup': args.warmup, **machine()}
    figures = [{**asdict(row), 'distance_percent': row.distance} for row in rows]
    steps = [{'method': name, 'optim_wrapper': settings[name], 'seconds': times[name]} for name in times]
    table = benchmark.step_table(rows)
    if benchmark.FLOAT in times:
        table += f'\n{quantization_cost(times)}'
    return table, {**setting, 'rows': figures, 'steps': steps}


def quantization_cost(times: dict[str, list[float]]) -> str:
    """What a step of the base optimizer costs more on the quantized model than on the float one, in words."""
    pairs = zip(times['base'], times[benchmark.FLOAT], strict=True)
    ratio = benchmark.quartiles([quantized / plain for quantized, plain in pairs])
    return f'base, quantized over float: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})'


def measure_history(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure a sample history; returns the table and the figures."""
    samples = parse_count(args.history)
    costs = [benchmark.measure_history(samples, kind) for kind in ('dense', 'sparse')]
    return benchmark.history_table(costs), {**machine(), 'history': [asdict(cost) for cost in costs]}


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
    table, figures = measure_steps(args) if args.history is None else measure_history(args)
    print(table)
    print(f'{figures["device"]}, {figures["cores"]} cores, {figures["threads"]} threads, torch {figures["torch"]}')
    if args.out is not None:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(figures, indent=2, default=str) + '\n')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
