"""The command: ``python -m tests.sweep.quantized FOUND.jsonl [--page docs/quantized_backbones.md] [--only VGG]``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger

from tests.sweep.quantized_backbones import BACKBONES
from tests.sweep.quantized_trial import POLICIES, Found, trial

HEAD = """# The backbones that were quantized

`make sweep-qat` quantizes a small pose estimator with each of the backbones that MMPose ships, and some of
timm's and MMPretrain's, and writes this page. A model is MMPose's recipe with few layers, narrow where a config can say
so, for pictures of 64x64 pixels (too small for HourglassNet, which halves them more often). [Quantize and
deploy](quantize_and_deploy.md) says how to quantize yours.

For W8A8 (`w8a8_onnxruntime.py`) and W4A4 each model is calibrated, trained for two steps by SAM, and exported as
QCDQ. Then the file runs in ONNX Runtime.

- *layers*: convolutions, deconvolutions and fully connected layers that are quantized, of all.
- *BatchNorms*: how many are folded, of all.
- *trained*: two steps of SAM, the losses finite.
- *exported*: the file agrees with PyTorch: given the same input, at least 99.9 % of each model's integers are equal,
  and none is more than one step off.
- *in integers*: convolutions that ONNX Runtime computes in integers after its optimization, of all (W8A8). A
  deconvolution counts as one.
"""


def main() -> None:
    """Try the backbones whose names ``--only`` matches; what the file has of the others stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='JSON lines, one for each backbone')
    parser.add_argument('--page', type=Path, help='the page that is written')
    parser.add_argument('--only', default='', help='a regular expression, searched in the names of backbones')
    options = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    MMLogger.get_instance('quantized', log_level='ERROR')
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    found = {each['name']: each for each in map(json.loads, lines)}
    for name in BACKBONES:
        if not re.search(options.only, name):
            continue
        began = time.process_time()
        found[name] = attempt(name)
        sys.stdout.write(f'{time.process_time() - began:5.1f} s  {row(found[name])}\n')
        sys.stdout.flush()
        options.out.write_text(''.join(json.dumps(each) + '\n' for each in found.values()))
    if options.page:
        options.page.write_text(page(found))


def attempt(name: str) -> Found:
    """What :func:`trial` gives, or the error that no user should see."""
    try:
        return trial(name)
    except Exception as error:
        traceback.print_exc()
        return {'name': name, 'fault': ' '.join(f'{type(error).__name__}: {error}'.split())}


def page(found: Mapping[str, Found]) -> str:
    """The page's text, of what was found for each backbone, by name."""
    some = [found[name] for name in BACKBONES if name in found]
    columns = ['backbone', 'layers', 'BatchNorms']
    columns += [f'{policy} {what}' for policy in POLICIES for what in ('trained', 'exported')] + ['in integers']
    table = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|', *map(row, some)]
    parts = [HEAD, '\n'.join(table)]
    if missing := [name for name in BACKBONES if name not in found]:
        parts.append(f'Not tried yet: {", ".join(missing)}.')
    for title, key in (('Refused before training', 'refused'), ('Faults', 'fault')):
        if lines := [f'- {each["name"]}: {_short(each[key])}' for each in some if key in each]:
            parts.append(f'## {title}\n\n' + '\n'.join(lines))
    lines = [
        f'- {each["name"]}: {_short(first["not_exported"])}'
        for each in some
        if 'not_exported' in (first := _first(each))
    ]
    if lines:
        parts.append('## Trained, but not exported\n\nThe log says so before training begins.\n\n' + '\n'.join(lines))
    lines = [
        f'- {each["name"]}: {"; ".join(first["reasons"])}' for each in some if (first := _first(each)).get('reasons')
    ]
    if lines:
        parts.append('## What stays in float\n\nThe table in the log has the layers by name.\n\n' + '\n'.join(lines))
    return '\n\n'.join(part.rstrip('\n') for part in parts) + '\n'


def row(each: Found) -> str:
    """A backbone's row of the table."""
    if 'W8A8' not in each:
        said = 'refused' if 'refused' in each else 'fault'
        return f'| {each["name"]} | {said} |' + ' |' * (2 * len(POLICIES) + 2)
    first = _first(each)
    cells = [each['name'], _share(first['layers']), _share(first['batchnorms'])]
    for policy in POLICIES:
        cells += ['yes' if each[policy]['trained'] else 'no', _exported(each[policy])]
    return f'| {" | ".join([*cells, _share(first.get("convolutions"))])} |'


def _first(each: Found) -> dict[str, Any]:
    return each.get(next(iter(POLICIES))) or {}


def _share(count: Any) -> str:
    return f'{count[0]} of {count[1]}' if count else ''


def _exported(found: Found) -> str:
    return 'refused' if 'not_exported' in found else 'yes' if found['agrees'] else 'differs'


def _short(text: str) -> str:
    return text if len(text) < 400 else f'{text[:400]} …'


if __name__ == '__main__':
    main()
