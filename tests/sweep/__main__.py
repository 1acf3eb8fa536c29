"""The command: ``python -m tests.sweep FOUND.jsonl [--page docs/model_sweep.md] [--methods SAM,ESAM,AUSAM]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

from tests.sweep.page import page
from tests.sweep.process import attempt
from tests.sweep.recipes import PACKAGES, recipes


def main() -> None:
    """Try all recipes, one after the other; each result is appended to the file as a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='JSON lines, one for each model')
    parser.add_argument('--page', type=Path, help='the page that is written')
    parser.add_argument('--packages', default=','.join(PACKAGES))
    parser.add_argument('--methods', default='SAM')
    parser.add_argument('--every', action='store_true', help='one config for each set of classes, not for each class')
    parser.add_argument('--only', default='', help='a part of the path of the configs to try')
    options = parser.parse_args()
    warnings.simplefilter('ignore')
    methods, found, unread = options.methods.split(','), [], {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open('w') as stream:
        for package in options.packages.split(','):
            some, unread[package] = recipes(package, options.every)
            for recipe in some:
                if options.only not in recipe.path:
                    continue
                began = time.perf_counter()
                result = attempt(recipe, methods)
                found.append({'package': package, 'path': recipe.name, 'alike': recipe.alike, **result})
                stream.write(json.dumps(found[-1]) + '\n')
                stream.flush()
                said = result.get('error') or ' '.join(f'{method}: {result[method]}' for method in methods)
                sys.stdout.write(f'{time.perf_counter() - began:5.1f} s  {package} {recipe.name}  {said[:200]}\n')
                sys.stdout.flush()
    if options.page:
        options.page.write_text(page(found, unread, methods))


if __name__ == '__main__':
    main()
