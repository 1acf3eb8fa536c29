#!/usr/bin/env python
"""Run an exported model on a picture and draw the keypoints: numpy, OpenCV and ONNX Runtime are all it needs.

python draw_keypoints.py MODEL.onnx IMAGE --bbox 40 25 110 260 --out keypoints.jpg

Copy this file and the model to wherever it shall run. The constants of cropping, normalisation and decoding are in the
model's metadata (tools/export.py wrote them there); the arithmetic is that of MMPose 1.x, without a flip test.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
_KNOWN_VERSION = 1


class UsageError(Exception):
    """Something that the user can put right; its message says how."""


class Model:
    """An exported model, with what it says of itself.

    Args:
        file: The ONNX file, of the form qcdq.

    Raises:
        UsageError: ONNX Runtime cannot run it, it was not written by tools/export.py, or its pictures have not three
            channels.
    """

    def __init__(self, file: str | Path) -> None:
        if not Path(file).is_file():
            raise UsageError(f"no model '{file}'")
        options = onnxruntime.SessionOptions()
        # On x86 processors without VNNI instructions, products of 8-bit integers overflow otherwise.
        options.add_session_config_entry('session.x64quantprecision', '1')
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        except Exception as error:  # ONNX Runtime's own kinds of errors have no common name in Python
            if 'qonnx' in str(error):
                raise UsageError(f"'{file}' is a QONNX file: export with --format qcdq to run it here") from error
            raise UsageError(f"ONNX Runtime cannot read '{file}': {str(error).splitlines()[0]}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map.get('mm_sharp')
        if metadata is None:
            raise UsageError(f"'{file}' has no metadata of mm_sharp: write it with tools/export.py")
        self.constants: dict[str, Any] = json.loads(metadata)
        if 'version' not in self.constants:
            raise UsageError(f"'{file}' has no constants of cropping and decoding: write it with tools/export.py")
        if self.constants['version'] > _KNOWN_VERSION:
            raise UsageError(f"'{file}' was written by a later version of mm_sharp: take its draw_keypoints.py")
        channels = len(self.constants['input']['mean'])
        if channels != 3:
            raise UsageError(f"'{file}' takes pictures of {channels} channel(s), and only 3 are written here")

    def predict(self, image: Array, boxes: Array) -> tuple[Array, Array]:
        """Find the keypoints of people.

        Args:
            image: (H, W, 3) uint8, BGR, as ``cv2.imread`` reads it.
            boxes: (people, 4): left, top, width and height in pixels.

        Returns:
            (people, keypoints, 2) x and y in pixels of the picture, and (people, keypoints) scores.
        """
        crops = [crop(image, box, self.constants) for box in boxes]
        inputs = np.stack([normalise(picture, self.constants['input']) for picture, _, _ in crops])
        outputs = self._session.run(self.constants['outputs'], {self.constants['input']['name']: inputs})
        points, scores = decode(outputs, self.constants)
        centers, sizes = (np.stack([c[i] for c in crops])[:, None] for i in (1, 2))
        size = np.array([self.constants['input'][side] for side in ('width', 'height')])
        points = points / size * sizes + centers - 0.5 * sizes
        chosen = self.constants['output_keypoint_indices']
        return (points, scores) if chosen is None else (points[:, chosen], scores[:, chosen])


# -------------------------------------------------------------------- from the picture to the input
def crop(image: Array, box: Array, constants: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Cut a person out and scale them to the input's size.

    Returns:
        The picture, and the centre and size, in pixels of the image, of the rectangle that it shows.
    """
    width, height = constants['input']['width'], constants['input']['height']
    # The box's corners in float32, as MMPose holds them.
    low, high = box[:2].astype(np.float32), (box[:2] + box[2:]).astype(np.float32)
    center, size = (low + high) * 0.5, (high - low) * constants['crop']['padding']
    size = np.maximum(size, [size[1] * width / height, size[0] * height / width])
    if constants['crop']['udp']:
        steps = np.array([width - 1, height - 1]) / size
        matrix = np.zeros((2, 3), np.float32)
        matrix[[0, 1], [0, 1]], matrix[:, 2] = steps, steps * (0.5 * size - center)
    else:
        matrix = cv2.getAffineTransform(_corner(center, size[0]), _corner(np.array([width * 0.5, height * 0.5]), width))
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR), center, size


def _corner(center: Array, width: float) -> Array:
    """Three points that fix a transform: the centre, the middle of the left edge, and half a width below that."""
    left = center + np.array([width * -0.5, 0.0])
    return np.array([center, left, left + np.array([0.0, width * 0.5])], np.float32)


def normalise(picture: Array, constants: dict[str, Any]) -> Array:
    """(H, W, 3) uint8 BGR to (3, H, W) float32, as the network takes it."""
    if constants['channels'] == 'rgb':
        picture = picture[..., ::-1]
    values = (picture.astype(np.float32) - np.float32(constants['mean'])) / np.float32(constants['std'])
    return np.ascontiguousarray(values.transpose(2, 0, 1))


# -------------------------------------------------------------------- from the outputs to keypoints
def decode(outputs: Sequence[Array], constants: dict[str, Any]) -> tuple[Array, Array]:
    """The outputs of a batch as (N, K, 2) x and y in pixels of the input, and (N, K) scores.

    Raises:
        UsageError: The model's codec is none of those that are written here.
    """
    codec = constants['codec']
    kind = codec['type']
    if kind == 'SimCCLabel' and not codec['use_dark']:
        return decode_simcc(outputs[0], outputs[1], codec)
    heatmaps = {'MSRAHeatmap': decode_msra, 'UDPHeatmap': decode_udp, 'MegviiHeatmap': decode_megvii}
    if kind in heatmaps:
        decoded = [heatmaps[kind](maps.copy(), codec) for maps in outputs[0]]
        return np.stack([points for points, _ in decoded]), np.stack([scores for _, scores in decoded])
    if kind == 'RegressionLabel':
        return decode_regression(outputs[0], codec, sigmoid=constants['head'] == 'RLEHead')
    raise UsageError(f'the codec {kind} ({codec}) is not written here; decode the outputs with MMPose')


def decode_simcc(simcc_x: Array, simcc_y: Array, codec: dict[str, Any]) -> tuple[Array, Array]:
    """The most likely bin of each axis."""
    points = np.stack([simcc_x.argmax(-1), simcc_y.argmax(-1)], axis=-1).astype(np.float32)
    scores = np.minimum(simcc_x.max(-1), simcc_y.max(-1))
    points[scores <= 0] = -1
    return points / codec['simcc_split_ratio'], scores


def decode_regression(outputs: Array, codec: dict[str, Any], *, sigmoid: bool) -> tuple[Array, Array]:
    """Coordinates as fractions of the input; columns 3 and 4, where there are any, are standard deviations."""
    scores = np.ones(outputs.shape[:2], np.float32)
    if outputs.shape[-1] == 4:
        deviations = 1 / (1 + np.exp(-outputs[..., 2:])) if sigmoid else outputs[..., 2:]
        scores = (1 - deviations).mean(-1)
    return outputs[..., :2] * np.array(codec['input_size']), scores


def decode_msra(maps: Array, codec: dict[str, Any]) -> tuple[Array, Array]:
    """The highest pixel of each heatmap, moved by a quarter towards its higher neighbour, or by DARK's Newton step."""
    points, scores = _highest(maps)
    height, width = maps.shape[1:]
    if codec['unbiased']:
        logs = np.log(np.maximum(_blurred(maps, codec['blur_kernel_size']), 1e-10))
        inside = ((points > 1) & (points < np.array([width - 2, height - 2]))).all(-1)
        for k in np.flatnonzero(inside):
            points[k] += _newton_step(logs[k], points[k].astype(int), reach=2)
    else:
        for k, (x, y) in enumerate(points.astype(int)):
            if 1 < x < width - 1 and 0 < y < height:
                points[k, 0] += 0.25 * np.sign(maps[k, y, x + 1] - maps[k, y, x - 1])
            if 1 < y < height - 1 and 0 < x < width:
                points[k, 1] += 0.25 * np.sign(maps[k, y + 1, x] - maps[k, y - 1, x])
    return _in_input(points, codec), scores


def decode_udp(maps: Array, codec: dict[str, Any]) -> tuple[Array, Array]:
    """UDP: a heatmap and a Newton step, or (``combined``) a class map and two maps of offsets."""
    height, width = maps.shape[1:]
    if codec['heatmap_type'] == 'combined':
        kernel = 2 * codec['blur_kernel_size'] + 1
        points, scores = _highest(np.stack([cv2.GaussianBlur(m, (kernel, kernel), 0) for m in maps[::3]]))
        for k in np.flatnonzero(scores > 0):
            x, y = points[k].astype(int)
            points[k] += codec['radius_factor'] * max(width, height) * maps[3 * k + 1 : 3 * k + 3, y, x]
    else:
        points, scores = _highest(maps)
        logs = np.log(np.clip(_blurred(maps, codec['blur_kernel_size']), 1e-3, 50.0))
        padded = np.pad(logs, ((0, 0), (1, 1), (1, 1)), mode='edge')
        for k in np.flatnonzero(scores > 0):
            points[k] += _newton_step(padded[k], points[k].astype(int) + 1, reach=1)
    return points / np.array([width - 1, height - 1]) * np.array(codec['input_size']), scores


def decode_megvii(maps: Array, codec: dict[str, Any]) -> tuple[Array, Array]:
    """The highest pixel of each blurred heatmap, and a quarter, a half or three quarters of one but at the edges."""
    maps = _blurred(maps, codec['kernel_size'])
    points, scores = _highest(maps)
    inside = ((points > 1) & (points < np.array(maps.shape[:0:-1]) - 1)).all(-1)
    for k in np.flatnonzero(inside):
        x, y = points[k].astype(int)
        steps = [maps[k, y, x + 1] - maps[k, y, x - 1], maps[k, y + 1, x] - maps[k, y - 1, x]]
        points[k] += 0.25 * np.sign(steps) + 0.5
    return _in_input(points, codec), scores / 255 + 0.5


def _highest(maps: Array) -> tuple[Array, Array]:
    """(K, 2) x and y of the highest pixel of each map, -1 where nothing is above 0, and (K,) its values."""
    flat = maps.reshape(len(maps), -1)
    rows, columns = np.unravel_index(flat.argmax(-1), maps.shape[1:])
    points, scores = np.stack([columns, rows], axis=-1).astype(np.float32), flat.max(-1)
    points[scores <= 0] = -1
    return points, scores


def _in_input(points: Array, codec: dict[str, Any]) -> Array:
    """Points of a heatmap in pixels of the input."""
    scaled: Array = points * (np.array(codec['input_size']) / np.array(codec['heatmap_size'])).astype(np.float32)
    return scaled


def _blurred(maps: Array, kernel: int) -> Array:
    """Blur each map, with zeros around it, and scale it back to its maximum."""
    blurred = np.stack([cv2.GaussianBlur(m, (kernel, kernel), 0, borderType=cv2.BORDER_CONSTANT) for m in maps])
    highest = blurred.max((1, 2), keepdims=True)
    scaled: Array = blurred * (maps.max((1, 2), keepdims=True) / np.where(highest == 0, 1, highest))
    return scaled


def _newton_step(logs: Array, pixel: Array, *, reach: int) -> Array:
    """From a pixel to the top of the paraboloid through its neighbours; for second ones, those ``reach`` away."""
    x, y = pixel
    dx, dy = (logs[y, x + 1] - logs[y, x - 1]) / 2, (logs[y + 1, x] - logs[y - 1, x]) / 2
    dxx = (logs[y, x + reach] - 2 * logs[y, x] + logs[y, x - reach]) / reach**2
    dyy = (logs[y + reach, x] - 2 * logs[y, x] + logs[y - reach, x]) / reach**2
    if reach == 1:  # UDP takes the mixed difference from one diagonal, DARK from all four corners
        dxy = logs[y + 1, x + 1] - logs[y, x + 1] - logs[y + 1, x] + 2 * logs[y, x]
        dxy = (dxy - logs[y, x - 1] - logs[y - 1, x] + logs[y - 1, x - 1]) / 2
    else:
        dxy = (logs[y + 1, x + 1] - logs[y - 1, x + 1] - logs[y + 1, x - 1] + logs[y - 1, x - 1]) / 4
    hessian = np.array([[dxx, dxy], [dxy, dyy]])
    if reach == 1:
        hessian += np.finfo(np.float32).eps * np.eye(2)
    elif dxx * dyy == dxy**2:
        return np.zeros(2)
    step: Array = -np.linalg.inv(hessian) @ np.array([dx, dy])
    return step


# -------------------------------------------------------------------- the picture
def draw(image: Array, points: Array, scores: Array, keypoints: dict[str, Any], threshold: float) -> Array:
    """A copy of the picture with the links and keypoints of all people whose score is above a threshold."""
    picture = image.copy()
    width = max(1, round(min(image.shape[:2]) / 250))
    count = points.shape[1]
    colors = keypoints['colors'] or [[0, 255, 0]] * count
    links = [link for link in keypoints['skeleton'] or [] if max(link) < count]
    link_colors = keypoints['skeleton_colors'] or [[255, 128, 0]] * len(links)
    for person, seen in zip(np.rint(points).astype(int), scores > threshold, strict=True):
        places = [(int(x), int(y)) for x, y in person]
        for (start, end), color in zip(links, link_colors, strict=False):
            if seen[start] and seen[end]:
                cv2.line(picture, places[start], places[end], color[::-1], width, cv2.LINE_AA)
        for place, color, is_seen in zip(places, colors, seen, strict=False):
            if is_seen:
                cv2.circle(picture, place, 2 * width, color[::-1], -1, cv2.LINE_AA)
    return picture


def _make_folder_of(file: str, option: str) -> None:
    """Make the folder that a file is to be written into; a UsageError if that cannot be, or the file is a folder."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} '{file}': its folder cannot be made ({error.strerror})") from error
    if Path(file).is_dir():
        raise UsageError(f"{option} '{file}' is a folder: give a file's name")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(
            f'{message}; write {self.prog} MODEL.onnx IMAGE --out keypoints.jpg (all options: {self.prog} --help)'
        )


def main(arguments: Sequence[str]) -> None:
    """Find, draw and print keypoints."""
    parser = _Parser(description='Run an exported model on a picture and draw the keypoints')
    parser.add_argument('model', help='ONNX file of tools/export.py --format qcdq, or float')
    parser.add_argument('image', help='picture')
    parser.add_argument(
        '--bbox',
        nargs=4,
        type=float,
        action='append',
        metavar=('X', 'Y', 'W', 'H'),
        help='box of a person: left, top, width, height in pixels; once for each person (default: the whole picture)',
    )
    parser.add_argument('--out', required=True, metavar='FILE', help='picture to write (.jpg, .png)')
    parser.add_argument('--json', metavar='FILE', help='write the keypoints, too')
    parser.add_argument('--threshold', type=float, default=0.0, help='draw keypoints with scores above it (default: 0)')
    args = parser.parse_args(arguments)
    image, writes = None, False
    with contextlib.suppress(cv2.error):  # of a format that OpenCV has switched off, as OpenEXR
        image = cv2.imread(args.image, cv2.IMREAD_COLOR) if Path(args.image).is_file() else None
        writes = cv2.haveImageWriter(args.out)
    if image is None:
        raise UsageError(f"'{args.image}' is not there, or no picture that OpenCV reads")
    boxes = np.array(args.bbox or [[0, 0, image.shape[1], image.shape[0]]])
    if not (np.abs(boxes) < 1e7).all():  # nan, too; larger than any picture that OpenCV reads
        raise UsageError('--bbox: all four must be numbers below 10 million, in pixels')
    if (boxes[:, 2:] <= 0).any():
        raise UsageError('--bbox: width and height must be above 0')
    model = Model(args.model)
    for option, file in (('--out', args.out), ('--json', args.json)):
        if file is not None:
            _make_folder_of(file, option)
    if not writes:
        raise UsageError(f"--out '{args.out}': OpenCV writes .jpg and .png, among others")
    points, scores = model.predict(image, boxes)
    if not cv2.imwrite(args.out, draw(image, points, scores, model.constants['keypoints'], args.threshold)):
        raise UsageError(f"--out '{args.out}' cannot be written: give another place")
    print(f'{len(boxes)} people, {points.shape[1]} keypoints each, mean score {scores.mean():.3f}: {args.out}')
    if args.json is not None:
        people = [{'keypoints': p.tolist(), 'scores': s.tolist()} for p, s in zip(points, scores, strict=True)]
        content = {'names': model.constants['keypoints']['names'], 'people': people}
        try:
            Path(args.json).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        except OSError as error:
            raise UsageError(f"--json '{args.json}' cannot be written: {error.strerror}") from error


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UsageError as usage_error:
        sys.stderr.write(f'{Path(sys.argv[0]).name}: error: {usage_error}\n')
        sys.exit(2)
