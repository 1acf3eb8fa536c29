#!/usr/bin/env python
"""Measure how sharp the minima are at which checkpoints lie, and compare them.

python tools/analyze_sharpness.py CONFIG base.pth sam.pth --names base sam --samples 256 --landscape 1d 2d
python tools/analyze_sharpness.py CONFIG base.pth OTHER_CONFIG.py:sam.pth

A checkpoint is of the first config, unless its own is written before it, with a colon.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config

# Importing the package mends the stack; MMPose is first imported after it, when a model is built.
from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.sharpness.loading import SPLITS, Samples, dataset_config, load_model, load_samples
from mm_sharp.analysis.sharpness.measure import Settings, measure
from mm_sharp.analysis.sharpness.report import Entry, content, draw, row, table
from mm_sharp.analysis.tables import csv_text, write_json
from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import check_checkpoint
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError

_SAMPLES = 256
_OWN_CONFIG = re.compile(r'(.+\.(?:py|json|ya?ml)):(.+)')


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    defaults = Settings()
    parser = cli.config_parser('Measure how sharp the minima are at which checkpoints lie')
    add, whole, positive = parser.add_argument, cli.whole, cli.positive
    file = 'checkpoint file, or CONFIG.py:FILE with a config of its own'
    add('checkpoints', nargs='+', metavar='checkpoint', help=file)
    add('--names', nargs='+', help='what tables and figures call them (default: from folders and files)')
    add('--split', choices=SPLITS, default='train', help='data to take the loss over (default: train)')
    first = f'the first so many after a seeded shuffle (default: {_SAMPLES}, or all if there are fewer)'
    add('--samples', type=whole(1), help=first)
    add('--batch-size', type=whole(1), default=32, help='samples at once: memory and time, not results (default: 32)')
    add('--rho', type=positive, nargs='+', default=[*defaults.rhos], help='radii of balls (default: 0.01 0.05 0.1)')
    add('--ascent-steps', type=whole(0), default=5, help='of projected gradient ascent in each ball (default: 5)')
    add('--eigenvalues', type=whole(0), default=1, help='how many of the largest of the Hessian; 0: none (default: 1)')
    add('--tolerance', type=positive, default=defaults.tolerance, help='of the eigenvalues, relative (default: 0.001)')
    add('--trace-draws', type=whole(0), default=30, help="for the Hessian's trace; 0: no trace (default: 30)")
    add('--landscape', nargs='+', choices=['1d', '2d', 'none'], default=['1d'], help='(default: 1d)')
    add('--radius', type=positive, default=defaults.radius, help="of the landscape, in filters' norms (default: 1)")
    add('--points', type=whole(2), default=defaults.points, help='of the landscape along each axis (default: 21)')
    add('--perturb', choices=['auto', 'all', 'weights'], default='auto', help='parameters that move (default: auto)')
    add('--dtype', choices=['float32', 'float64'], default='float32', help="of the models' arithmetic")
    add('--seed', type=whole(0, 2**32 - 1), default=0, help='of the samples, draws and directions (default: 0)')
    add('--out-dir', default='work_dirs/sharpness', help='folder for the results (default: work_dirs/sharpness)')
    cli.add_trust(parser)
    args = parser.parse_args(arguments)
    if args.trace_draws == 1:
        parser.error('--trace-draws 1: one draw has no standard error; give at least 2, or 0 for no trace')
    finest = {'float32': 1e-5, 'float64': 1e-10}[args.dtype]
    if args.tolerance < finest:
        parser.error(f'--tolerance {args.tolerance:g}: with --dtype {args.dtype} it must be at least {finest:g}')
    if len({*args.rho}) < len(args.rho):
        parser.error(f'--rho {" ".join(f"{rho:g}" for rho in args.rho)}: the same value twice')
    if 'none' in args.landscape and len({*args.landscape}) > 1:
        parser.error('--landscape: none does not go with others')
    return args


def checkpoints(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Name, config file and checkpoint file of each checkpoint; a UsageError for names that are missing or the same."""
    pairs = []
    for given in args.checkpoints:
        own = None if Path(given).exists() or '://' in given else _OWN_CONFIG.fullmatch(given)
        pairs.append((own[1], own[2]) if own else (args.config, given))
    names = args.names or _names([checkpoint for _, checkpoint in pairs])
    if len(names) != len(pairs):
        raise UsageError(f'--names {" ".join(names)}: {len(names)} names for {len(pairs)} checkpoints')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f'{twice[0]!r} is the name of two checkpoints: give each its own with --names')
    return [(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _names(checkpoints: Sequence[str]) -> list[str]:
    """The files' names, with their folders' where these are the same, or the folders' alone."""
    files = [Path(checkpoint) for checkpoint in checkpoints]
    stems = [file.stem for file in files]
    if len({*stems}) == len(stems):
        return stems
    return [f'{file.resolve().parent.name}/{file.stem}' for file in files]


def configure(args: argparse.Namespace) -> list[tuple[str, str, str, Config]]:
    """Name, config file, checkpoint file and config of each checkpoint; a UsageError for what does not fit."""
    configs: dict[str, Config] = {}
    found = []
    for name, config, checkpoint in checkpoints(args):
        if config not in configs:
            configs[config] = cli.load_config(argparse.Namespace(**{**vars(args), 'config': config}))
            preflight.check_data(configs[config], args.split)
        check_checkpoint(checkpoint, 'checkpoint')
        found.append((name, config, checkpoint, configs[config]))
    return found


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line asks for."""
    landscape = tuple(kind for kind in ('1d', '2d') if kind in args.landscape)
    same = {name: getattr(args, name) for name in vars(Settings()) if hasattr(args, name)}
    return Settings(**{**same, 'rhos': tuple(args.rho), 'landscape': landscape})


def analyze(args: argparse.Namespace) -> Iterator[Entry]:
    """Measure one checkpoint after the other, once all models and samples are loaded, so that mistakes show at once."""
    loaded = []
    # Configs that load the same data share the samples.
    samples: dict[str, Samples] = {}
    for name, config, checkpoint, cfg in configure(args):
        model = load_model(cfg, checkpoint, args.trust_checkpoint)
        key = repr((cfg.get('default_scope'), dataset_config(cfg, args.split)))
        if key not in samples:
            with prepared(cfg):
                count, seed = args.samples or _SAMPLES, args.seed
                samples[key] = load_samples(cfg, args.split, count, seed, at_most=args.samples is None)
        loaded.append((name, config, checkpoint, cfg, model, samples[key]))
    for name, config, checkpoint, cfg, (network, epoch, quantized), data in loaded:
        with prepared(cfg, epoch):
            found = measure(network, data, settings_of(args), quantized, name)
        yield Entry(name, config, checkpoint, epoch, data, found)


def main(arguments: Sequence[str]) -> None:
    """Measure, write the files, after each checkpoint again, and print the table."""
    args = parse_arguments(arguments)
    folder, settings = cli.output_folder(args.out_dir), settings_of(args)
    entries: list[Entry] = []
    for entry in analyze(args):
        entries.append(entry)
        (folder / 'sharpness.csv').write_text(csv_text([*map(row, entries)]), encoding='utf-8')
        write_json(folder / 'sharpness.json', content(entries, settings, cli.machine()))
        draw(folder / 'landscape.png', entries, settings)
        seconds = sum(entry.findings.seconds.values())
        print(f'{entry.name}: measured in {seconds:.0f} s ({len(entries)} of {len(args.checkpoints)})', flush=True)
    print(f'\n{table(entries)}')
    print(f'Written: {folder}/sharpness.csv, sharpness.json, landscape.png')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
