"""A contact sheet: a row for each person, the annotated keypoints, and beside them what each run predicts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.runner import Runner
from numpy.typing import NDArray

from mm_sharp.analysis.prepare import prepared
from mm_sharp.analysis.runs.trained_run import TrainedRun
from mm_sharp.analysis.sharpness.loading import load_model
from mm_sharp.errors import UsageError

Array = NDArray[Any]
Link = tuple[int, int]  # two keypoints that are joined by a line
_SCALE = 3  # pixels of the sheet for one of a picture


class Keypoints(NamedTuple):
    """The keypoints of one person."""

    points: Array  # (K, 2), x and y in pixels of the picture
    drawn: Array  # (K,) bool


class Person(NamedTuple):
    """One person of the test data."""

    picture: Array  # (H, W, 3), RGB
    columns: list[Keypoints]  # as annotated, then as each run predicts


def find_people(runs: Sequence[TrainedRun], count: int, threshold: float) -> tuple[list[Person], list[Link]]:
    """``count`` people of the test data, the same of all runs, with what the last checkpoints predict; and their links.

    Predicted keypoints with scores below the threshold are not drawn.
    """
    predicted, links = zip(*(_predictions(run, count) for run in runs), strict=True)
    people = []
    for samples in zip(*predicted, strict=True):
        truth = samples[0].gt_instances
        columns = [Keypoints(truth.keypoints[0], truth.keypoints_visible[0] > 0)]
        for sample in samples:
            found = sample.pred_instances
            columns.append(Keypoints(found.keypoints[0], found.keypoint_scores[0] >= threshold))
        people.append(Person(cv2.imread(samples[0].img_path)[:, :, ::-1], columns))
    return people, links[0]


def not_drawn(people: Sequence[Person], names: Sequence[str]) -> list[str]:
    """The runs whose columns have no keypoint; ``names`` are of all runs."""
    columns = list(zip(*(person.columns[1:] for person in people), strict=True))
    return [name for name, column in zip(names, columns, strict=True) if not any(found.drawn.any() for found in column)]


def _predictions(run: TrainedRun, count: int) -> tuple[list[Any], list[Link]]:
    model: Any = load_model(run.cfg, str(run.last))[0]
    model.eval()
    options = dict(deepcopy(run.cfg.test_dataloader), num_workers=0, persistent_workers=False)
    options['dataset'].pipeline[-1].pop('meta_keys', None)  # else the paths of the pictures are left out
    with prepared(run.cfg), torch.no_grad():
        loader = Runner.build_dataloader(options)
        dataset = loader.dataset
        if 'skeleton_links' not in (getattr(dataset, 'metainfo', None) or {}):
            raise UsageError(f"'{run.folder}': its test data has no keypoints to draw: leave them out with --people 0")
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int)
        found = model.test_step(loader.collate_fn([dataset[int(index)] for index in chosen]))
    return found, [(int(a), int(b)) for a, b in dataset.metainfo['skeleton_links']]


def draw_people(people: Sequence[Person], titles: Sequence[str], links: Sequence[Link], file: Path) -> None:
    """Draw the contact sheet, a row for each person; titles are of the columns: the annotation's, then the runs'."""
    from matplotlib.figure import Figure

    height, width = people[0].picture.shape[:2]
    size = (width * _SCALE * len(titles) / 100, (height * _SCALE + 24) * len(people) / 100)
    figure = Figure(figsize=size, dpi=100, layout='constrained')
    axes: Any = figure.subplots(len(people), len(titles), squeeze=False)
    for row, person in zip(axes, people, strict=True):
        truth = person.columns[0]
        for axis, title, found in zip(row, titles, person.columns, strict=True):
            axis.imshow(person.picture, interpolation='bicubic')
            axis.set(xlim=(-0.5, person.picture.shape[1] - 0.5), ylim=(person.picture.shape[0] - 0.5, -0.5))
            axis.axis('off')
            _draw_keypoints(axis, found, links)
            axis.set_title(title if found is truth else f'{title}: {_error(found, truth):.1f} pixels off', fontsize=10)
    figure.savefig(file)


def _draw_keypoints(axis: Any, found: Keypoints, links: Sequence[Link]) -> None:
    """Draw one person's keypoints: small dots and thin lines, so that faces stay readable; left green, right orange."""
    for a, b in links:
        if found.drawn[a] and found.drawn[b]:
            axis.plot(*found.points[[a, b]].T, color='deepskyblue', linewidth=1.5, alpha=0.8)
    for index in np.flatnonzero(found.drawn):
        colour = 'white' if index == 0 else ('lime' if index % 2 else 'orange')
        axis.plot(*found.points[index], 'o', color=colour, markersize=4.5, markeredgewidth=0)


def _error(found: Keypoints, truth: Keypoints) -> float:
    """Mean distance over the annotated keypoints, in pixels of the picture."""
    return float(np.linalg.norm(found.points - truth.points, axis=1)[truth.drawn].mean())
