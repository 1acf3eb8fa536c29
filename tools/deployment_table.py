#!/usr/bin/env python
"""Measure how large models' files are, and how fast in each runtime, float and quantized: a table in Markdown.

python tools/deployment_table.py configs/demo/simcc_res18-half_demo-128x96.py mmpose::RECIPE.py …

Weights are untrained, which changes no time and no size, and calibration is on noise. So there are no metrics in it:
``tools/export.py CONFIG CHECKPOINT --benchmark`` has those of a checkpoint, and measures in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS
from torch import nn

from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.tables import markdown_row, markdown_table
from mm_sharp.cli import options as cli
from mm_sharp.cli.loading import one_line
from mm_sharp.errors import UsageError

# Name, target, bits of weights, and whether they are packed. Activations have 8 bits.
_FILES: tuple[tuple[str, str, int, bool], ...] = (
    ("W8A8, `'onnxruntime'`", 'onnxruntime', 8, False),
    ("W8A8, `'openvino'`", 'openvino', 8, False),
    ("W4A8, `'onnxruntime'`, packed", 'onnxruntime', 4, True),
)
_PICTURES = 4


def read_config(name: str) -> Config:
    """A config file, or with ``::`` one of a package's: ``mmpose::body_2d_keypoint/…``.

    Raises UsageError: There is no such file, it is no config, or one without a model.
    """
    try:
        cfg = get_config(name) if '::' in name else Config.fromfile(name)
        model = cfg.get('model')
    except (OSError, ValueError) as error:
        raise UsageError(f"no config '{name}': give a float model's file, or mmpose::RECIPE.py ({error})") from error
    except Exception as error:  # a config is code of the user's: whatever it raises is theirs to put right
        raise UsageError(f"cannot read the config '{name}': {one_line(error)}") from error
    if not isinstance(model, Mapping):
        raise UsageError(f"'{name}' has no model = dict(…): give a recipe, such as mmpose::RECIPE.py")
    return cfg


def export_all(cfg: Config, folder: Path) -> dict[str, Path]:
    """Build a config's model, in float, with untrained weights, and export it in all forms; the files, by name."""
    from mm_sharp.quantization import calibrate, quantized_model
    from mm_sharp.quantization.build import float_config
    from mm_sharp.quantization.export import export_onnx

    with prepared(cfg):
        torch.manual_seed(0)
        source = MODELS.build(float_config(cfg.model)).eval()
        files = {'float': export_onnx(source, folder / 'float.onnx', 'float', {})}
        for number, (name, target, bits, packed) in enumerate(_FILES):
            policy = dict(target=target, weight_bit_width=bits, act_bit_width=8, scale_init='max')
            model = quantized_model(deepcopy(source), policy)
            calibrate(model, [_noise(model)])
            files[name] = export_onnx(model.eval(), folder / f'{number}.onnx', 'qcdq', {}, packed=packed)
    return files


def _noise(model: nn.Module) -> dict[str, Any]:
    """Pictures as a data loader delivers them."""
    from mmpose.structures import PoseDataSample

    from mm_sharp.quantization.deployment import codec_constants
    from mm_sharp.quantization.flow import channels_of

    width, height = codec_constants(model)['input_size']
    pictures = torch.randint(0, 256, (_PICTURES, channels_of(model), height, width), dtype=torch.uint8)
    return {'inputs': list(pictures), 'data_samples': [PoseDataSample() for _ in pictures]}


def rows(title: str, cfg: Config, rounds: int) -> Iterator[list[str]]:
    """A model's rows of the table: one for each file."""
    from mm_sharp.quantization import latency

    with TemporaryDirectory() as folder:
        files = export_all(cfg, Path(folder))
        found = latency.compare(files, rounds)
        for name, file in files.items():
            cells = [title if name == 'float' else '', name, f'{file.stat().st_size / 1e6:.2f}']
            for row in (row for row in found if row.name == name):
                cells += [f'{row.milliseconds:.2f}', f'{row.ratio:.2f}', f'{row.integers} of {row.convolutions}']
            yield cells


def main(arguments: Sequence[str]) -> None:
    """Measure each config's model, and print its rows as soon as they are there."""
    parser = cli.OneLineParser(description='Measure the files and the speed of models, float and quantized')
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help="of float models: files, or a package's with ::")
    parser.add_argument('--rounds', type=cli.whole(1), default=20, help='in which the files take turns (default: 20)')
    args = parser.parse_args(arguments)
    stems = [Path(name.rpartition('::')[2]).stem for name in args.configs]
    # Files of one name are told apart by their folders.
    titles = stems if len({*stems}) == len(stems) else args.configs
    configs = [read_config(name) for name in args.configs]
    from mm_sharp.quantization import latency

    torch.set_num_threads(1)
    names = [latency.RUNTIMES[package].name for package in latency.installed()]
    columns = chain(*([f'{name}, ms', 'times float', 'in integers'] for name in names))
    sys.stdout.write(markdown_table([['model', 'file', 'MB', *columns]]) + '\n')
    for cells in chain(*(rows(title, cfg, args.rounds) for title, cfg in zip(titles, configs, strict=True))):
        sys.stdout.write(markdown_row(cells) + '\n')
        sys.stdout.flush()


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
