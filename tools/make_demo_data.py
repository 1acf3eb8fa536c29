"""Draw the demo data set: articulated people with keypoints, in COCO's format.

python tools/make_demo_data.py --out data/demo --train 2048 --val 256 --seed 0

The same arguments give the same pictures on every machine. See ``mm_sharp/demo``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mm_sharp.demo import make_dataset


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw the demo data set, in COCO's keypoint format")
    add = parser.add_argument
    add('--out', type=Path, default=Path('data/demo'), help='folder to write (default: %(default)s)')
    add('--train', type=int, default=2048, help='number of training images (default: %(default)s)')
    add('--val', type=int, default=256, help='number of validation images (default: %(default)s)')
    add('--seed', type=int, default=0, help='of all random choices (default: %(default)s)')
    add('--workers', type=int, help='processes that draw (default: one per CPU core, at most 16)')
    add('--force', action='store_true', help='replace a demo data set made with other arguments')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        drawn = make_dataset(args.out, args.train, args.val, args.seed, workers=args.workers, force=args.force)
        there = f'{args.out}: {args.train} training and {args.val} validation images'
        print(f'{there} drawn' if drawn else f'{there} are already there')
    except (ValueError, OSError, RuntimeError) as error:
        print(f'make_demo_data: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'make_demo_data: interrupted; run it again to finish {args.out}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
