#!/usr/bin/env python
"""Train every method in every setting with every seed, and compare them.

python tools/study.py configs/study/digits.yaml --jobs 2
python tools/study.py configs/study/digits.yaml --table

A study that was broken off goes on where it was. Results: work_dirs/study/NAME/results.csv (one row a run), table.md,
comparisons.json and differences.png.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mm_sharp.analysis import study
from mm_sharp.analysis.tables import write_json
from mm_sharp.cli import options as cli
from mm_sharp.cli.process import INTERRUPTED, StoppedError
from mm_sharp.errors import UsageError


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.OneLineParser(description='Compare methods over settings and seeds')
    add, whole = parser.add_argument, cli.whole
    add('study', type=Path, metavar='STUDY.yaml', help='what is compared (see mm_sharp/analysis/study/spec.py)')
    add('--out-dir', type=Path, help='folder of the results (default: work_dirs/study/<name>)')
    add('--jobs', type=whole(1, 1024), default=1, help='runs at a time, each in a process (default: 1)')
    add('--threads', type=whole(1, 1024), default=1, help='threads of torch in each (default: 1)')
    add('--nice', type=whole(0, 19), default=0, help='give way to other programs: 1 to 19')
    add('--settings', nargs='+', metavar='NAME', help="only these of the study's settings, and those that they need")
    add('--redo', action='store_true', help='make runs again whose configs have changed')
    add('--table', action='store_true', help='make no runs: compare those that are there, and say what is missing')
    add('--debug', action='store_true', help='show the traceback of errors')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Make the runs, print the comparisons and write them."""
    args = parse_arguments(arguments)
    whole = study.read_study(args.study)
    chosen_study = study.only(whole, args.settings) if args.settings else whole
    folder = args.out_dir or Path('work_dirs/study') / whole.name
    plan = study.Plan(chosen_study, folder)
    if args.table:
        rows = study.Rows(folder / 'results.csv')
        if not rows.by_id:
            raise UsageError(f"no runs in '{folder}' yet: without --table they are made")
        report(whole, plan, rows)
        return
    plan.check_data()
    with study.locked(folder):
        rows = study.Rows(folder / 'results.csv')
        os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
        options = {'jobs': args.jobs, 'threads': args.threads, 'niceness': args.nice, 'redo': args.redo}
        before = dict(rows.by_id)
        try:
            study.run_missing(plan, rows, **options)
        except KeyboardInterrupt as error:
            made = f'{len(rows.by_id)} runs are in {rows.file}'
            raise StoppedError(f'interrupted; {made}; the same command goes on', INTERRUPTED) from error
        if args.redo and rows.by_id == before:
            print('--redo: no config has changed since its run, so none was made again\n')
        report(whole, plan, rows)


def report(whole: study.Study, plan: study.Plan, rows: study.Rows) -> None:
    """Print and write the comparisons; of an unfinished study with what is missing."""
    found = study.compare(plan, rows)
    parts = [study.markdown(whole, found.comparisons)]
    parts += [study.markdown_trials(plan, rows, names) for names in found.unfinished]
    parts.append('\n'.join(f'- {note}' for note in found.notes))
    text = '\n\n'.join(part for part in parts if part)
    (plan.folder / 'table.md').write_text(text + '\n')
    files = 'results.csv, table.md'
    if found.comparisons:
        write_json(plan.folder / 'comparisons.json', study.content(whole, found.comparisons, found.notes))
        study.plot(whole, found.comparisons, plan.folder / 'differences.png')
        files += ', differences.png'
        text += '\n\nBold: the 95 % interval leaves out 0.'
    print(f'{text}\n{plan.folder}: {files}')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
