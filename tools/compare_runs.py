#!/usr/bin/env python
"""Compare trained runs: a table, the curves of their logs, and what they predict beside the annotation.

python tools/compare_runs.py AdamW=work_dirs/demo/base AUSAM=work_dirs/demo/ausam --out-dir work_dirs/demo

Each is NAME=FOLDER, the work directory of a run of tools/train.py; the first is what the others are compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mm_sharp.analysis.runs.people import draw_people, find_people, not_drawn
from mm_sharp.analysis.runs.trained_run import (
    TrainedRun,
    draw_curves,
    held_out_metric,
    metrics_table,
    read_run,
    rises,
)
from mm_sharp.cli import options as cli
from mm_sharp.config import preflight
from mm_sharp.errors import UsageError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.OneLineParser(description='Compare trained runs')
    add, whole = parser.add_argument, cli.whole
    add('runs', nargs='+', metavar='NAME=FOLDER', help='what tables call a run, and its work directory')
    add('--out-dir', type=Path, required=True, help='folder for table.md, curves.png and people.png')
    metric = 'of table and curves: a key of the log (default: coco/AP, PCK or the first that is there)'
    add('--metric', help=metric)
    add('--people', type=whole(0), default=6, help='on the contact sheet; 0: none (default: 6)')
    add('--threshold', type=float, default=0.3, help='keypoints with lower scores are not drawn (default: 0.3)')
    sharpness = 'training samples to measure the sharpness on, at most; 0: none (default: 64)'
    add('--samples', type=whole(0), default=64, help=sharpness)
    add('--debug', action='store_true', help='show the traceback of usage errors')
    return parser.parse_args(arguments)


def read_runs(args: argparse.Namespace) -> list[TrainedRun]:
    """Read the work directories; a UsageError: one is none, or names are missing or the same."""
    pairs = [given.partition('=') for given in args.runs]
    names = [name for name, _, _ in pairs]
    if not all(name and folder for name, _, folder in pairs) or len({*names}) < len(names):
        raise UsageError(f'{" ".join(args.runs)}: give each run a name of its own, as base=work_dirs/demo/base')
    return [read_run(name, Path(folder)) for name, _, folder in pairs]


def _check_data(runs: Sequence[TrainedRun], options: Mapping[str, tuple[str, int]]) -> None:
    """Refuse runs without the data of the splits that an option asks for."""
    for run in runs:
        for split, (option, count) in options.items():
            if count:
                cli.require(run.cfg, str(run.folder), f'leave it out with {option} 0', f'{split}_dataloader')
                preflight.check_data(run.cfg, split)


def main(arguments: Sequence[str]) -> None:
    """Print the table and write the files."""
    args = parse_arguments(arguments)
    runs = read_runs(args)
    _check_data(runs, {'train': ('--samples', args.samples), 'test': ('--people', args.people)})
    metric = held_out_metric(runs, args.metric)
    cli.output_folder(args.out_dir)
    files, empty = ['table.md', 'curves.png'], []
    with contextlib.redirect_stdout(io.StringIO()):  # every data set says that it reads its annotations
        sharpness = {run.name: rises(run, args.samples) for run in runs} if args.samples else {}
        draw_curves(runs, metric, sharpness, args.out_dir / 'curves.png')
        if args.people:
            people, links = find_people(runs, args.people, args.threshold)
            titles = ['annotated', *(run.name for run in runs)]
            draw_people(people, titles, links, args.out_dir / 'people.png')
            files.append('people.png')
            empty = not_drawn(people, titles[1:])
    table = metrics_table(runs, sharpness, metric)
    (args.out_dir / 'table.md').write_text(table + '\n')
    print(f'{table}\n\n{args.out_dir}: {", ".join(files)}')
    if empty:
        scores = f'all scores of {", ".join(empty)} are below {args.threshold:g}'
        print(f'people.png shows no keypoints where {scores}: give a lower --threshold')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
