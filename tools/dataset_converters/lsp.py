#!/usr/bin/env python
"""Convert Leeds Sports Pose Extended to COCO keypoint files and small pictures of the people.

python tools/dataset_converters/lsp.py lspet_dataset.zip --out data/lsp

The archive of Johnson and Everingham (CVPR 2011; http://sam.johnson.io/research/lspet.html), or the folder that it was
unpacked to, has ``joints.mat``, (14, 3, 10000) of x, y and visible, and ``images/im00001.jpg`` and so on. It is for
research: cite them. Written are ``images/``, ``train.json``, ``select.json`` (to choose settings by) and ``val.json``
(to report on).

Neighbouring pictures are often of one scene, so the splits are stretches of the original order: first ``train.json``,
last ``val.json``. The training people are in a fixed random order, so that the first N of them are a fair sample. A
person's box is that of the visible joints, a fifth larger. The picture is cut to 1.5 times the box, so that rotated and
scaled crops find pixels there, and made smaller. Joints that are not visible, or outside of the picture, have no
annotation.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

# The package beside this file is used, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from mm_sharp.cli import options as cli
from mm_sharp.errors import UsageError

Array = npt.NDArray[Any]
Source = Path | zipfile.Path
JOINTS = (
    *('right_ankle', 'right_knee', 'right_hip', 'left_hip', 'left_knee', 'left_ankle', 'right_wrist', 'right_elbow'),
    *('right_shoulder', 'left_shoulder', 'left_elbow', 'left_wrist', 'neck', 'head_top'),
)
_BONES = (
    *(
        ('right_ankle', 'right_knee'),
        ('right_knee', 'right_hip'),
        ('left_ankle', 'left_knee'),
        ('left_knee', 'left_hip'),
    ),
    *(('right_wrist', 'right_elbow'), ('right_elbow', 'right_shoulder'), ('left_wrist', 'left_elbow')),
    *(
        ('left_elbow', 'left_shoulder'),
        ('right_hip', 'left_hip'),
        ('right_shoulder', 'neck'),
        ('left_shoulder', 'neck'),
    ),
    ('neck', 'head_top'),
)
# The box is larger than the joints' by this share; the picture is this many times the box.
_MARGIN, _PADDING = 0.2, 1.5
# The short side of the picture's box over the long one, at least: top-down models see boxes of 3:4.
_ASPECT = 0.75
_CITE = 'Leeds Sports Pose Extended (Johnson and Everingham, CVPR 2011), pictures cut and encoded again; for research'


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. The defaults give the data of ``configs/study/lsp.yaml``."""
    parser = cli.OneLineParser(description='Convert Leeds Sports Pose Extended to COCO keypoint files')
    add, whole = parser.add_argument, cli.whole
    add('source', type=Path, metavar='ARCHIVE', help='lspet_dataset.zip, or the folder with its content')
    add('--out', type=Path, default=Path('data/lsp'), help='folder to write (default: data/lsp)')
    add('--people', type=whole(3, 10**6), default=4000, help='as many, evenly spread (default: 4000 of 10000)')
    add('--select', type=whole(1, 10**6), default=500, help='people of select.json (default: 500)')
    add('--val', type=whole(1, 10**6), default=1200, help='people of val.json (default: 1200)')
    add('--side', type=whole(8, 10**4), default=160, help='longer side of the pictures at most (default: 160)')
    add('--quality', type=whole(1, 100), default=85, help='of the JPEG files, 1 to 100 (default: 85)')
    add('--debug', action='store_true', help='show the traceback of errors')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Write pictures and annotations."""
    args = parse_arguments(arguments)
    source = open_source(args.source)
    with source.joinpath('joints.mat').open('rb') as stream:
        joints = loadmat(io.BytesIO(stream.read()))['joints'].transpose(2, 0, 1).astype(np.float64)
    count = min(args.people, len(joints))
    if args.select + args.val >= count:
        message = f'--select {args.select} and --val {args.val} leave nobody of {count} people to train on'
        raise UsageError(f'{message}: take fewer')
    cli.output_folder(args.out / 'images')
    rows = np.linspace(0, len(joints) - 1, count).round().astype(int)
    people = [convert(source, args.out, int(row), joints[row], args.side, args.quality) for row in rows]
    train = count - args.select - args.val
    splits = {
        'train': np.random.default_rng(0).permutation(train),
        'select': np.arange(train, train + args.select),
        'val': np.arange(train + args.select, count),
    }
    for split, chosen in splits.items():
        (args.out / f'{split}.json').write_text(json.dumps(coco([people[i] for i in chosen]), separators=(',', ':')))
    print(f'{args.out}: {", ".join(f"{len(chosen)} people in {split}.json" for split, chosen in splits.items())}')


def open_source(path: Path) -> Source:
    """The folder, or that within the archive, which has ``joints.mat``.

    Raises:
        UsageError: There is none.
    """
    if path.is_dir():
        source: Source = path
    elif zipfile.is_zipfile(path):
        source = zipfile.Path(path)
    else:
        raise UsageError(f"'{path}' is neither a folder nor a zip file: get lspet_dataset.zip from its authors")
    for folder in (source, *(entry for entry in source.iterdir() if entry.is_dir())):
        if folder.joinpath('joints.mat').is_file():
            return folder
    raise UsageError(f"'{path}' has no joints.mat: it is not the archive of Leeds Sports Pose Extended")


def convert(source: Source, out: Path, row: int, joints: Array, side: int, quality: int) -> tuple[dict[str, Any], ...]:
    """Write the picture of one person; returns the entries of the picture and the person in COCO's form.

    Args:
        source: The original's folder.
        out: Where to write.
        row: The person's place in the original, from 0.
        joints: (14, 3): x and y in pixels of the original picture, and whether the joint is visible.
        side: The longer side of the new picture, in pixels, at most.
        quality: Of the JPEG file.
    """
    name = f'im{row + 1:05d}.jpg'
    with source.joinpath('images', name).open('rb') as stream:
        picture = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise UsageError(f"'{source}/images/{name}' is no picture")
    size = np.array(picture.shape[1::-1])
    seen = (joints[:, 2] > 0) & (joints[:, :2] >= 0).all(1) & (joints[:, :2] < size).all(1)
    low, extent = box_of(joints[seen, :2]) if seen.any() else (np.zeros(2), size.astype(np.float64))
    small, corner, scale = cut(picture, low + extent / 2, extent, side)
    cv2.imwrite(str(out / 'images' / name), small, [cv2.IMWRITE_JPEG_QUALITY, quality])
    points = np.where(seen[:, None], (joints[:, :2] - corner) * scale, 0.0).round(1)
    image = {'id': row + 1, 'file_name': name, 'height': small.shape[0], 'width': small.shape[1]}
    person = {
        'id': row + 1,
        'image_id': row + 1,
        'category_id': 1,
        'iscrowd': 0,
        'area': round(float(np.prod(extent * scale)), 1),
        'bbox': [round(float(value), 1) for value in (*((low - corner) * scale), *(extent * scale))],
        'num_keypoints': int(seen.sum()),
        'keypoints': np.concatenate([points, 2.0 * seen[:, None]], 1).ravel().tolist(),
    }
    return image, person


def box_of(points: Array) -> tuple[Array, Array]:
    """The left upper corner and the size, each (2,), of the box around points (N, 2) with its margin."""
    low, high = points.min(0), points.max(0)
    extent = np.maximum((high - low) * (1 + _MARGIN), 8.0)
    return (low + high - extent) / 2, extent


def cut(picture: Array, center: Array, extent: Array, side: int) -> tuple[Array, Array, float]:
    """The part of a picture around a box, smaller if it must be; its corner in the picture; and its scale."""
    half = np.maximum(extent, extent[::-1] * _ASPECT) * _PADDING / 2
    low = np.maximum(np.floor(center - half), 0).astype(int)
    high = np.minimum(np.ceil(center + half).astype(int), picture.shape[1::-1])
    part = picture[low[1] : high[1], low[0] : high[0]]
    scale = min(1.0, side / max(part.shape[:2]))
    if scale < 1:
        width, height = (max(1, round(length * scale)) for length in part.shape[1::-1])
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    return part, low, scale


def coco(people: Sequence[tuple[dict[str, Any], ...]]) -> dict[str, Any]:
    """A COCO keypoint file's content."""
    skeleton = [[JOINTS.index(a) + 1, JOINTS.index(b) + 1] for a, b in _BONES]
    person = {'id': 1, 'name': 'person', 'supercategory': 'person', 'keypoints': list(JOINTS), 'skeleton': skeleton}
    return {
        'info': {'description': _CITE},
        'images': [image for image, _ in people],
        'annotations': [annotation for _, annotation in people],
        'categories': [person],
    }


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
