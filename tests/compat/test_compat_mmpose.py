"""MMPose on the patched stack: registries, metrics and visualizers."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import Registry, init_default_scope

from mm_sharp.compat import mmpose_imports
from tests.coco_evaluation import coco_description, evaluate_coco


@pytest.fixture(scope='module')
def mmpose() -> Any:
    package = pytest.importorskip('mmpose')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ImportWarning)  # mmcv's, about a name that moved
        # Runs of other tests in this process may have left another scope, of which it would warn.
        importlib.import_module('mmpose.utils').register_all_modules(init_default_scope=False)
    init_default_scope('mmpose')
    return package


def test_all_registries_load(mmpose: Any) -> None:
    registries = importlib.import_module('mmpose.registry')
    sizes = {}
    for name, registry in vars(registries).items():
        if isinstance(registry, Registry) and registry.scope == 'mmpose':
            registry.import_from_location()
            sizes[name] = len(registry)
    filled = {'DATASETS', 'MODELS', 'METRICS', 'TRANSFORMS', 'KEYPOINT_CODECS', 'VISUALIZERS', 'HOOKS', 'INFERENCERS'}
    assert all(sizes[name] for name in filled), sizes
    assert {'TopdownPoseEstimator', 'EDPoseHead', 'RTMOHead', 'SimCCHead'} <= set(registries.MODELS.module_dict)
    assert {'CocoMetric', 'MpiiPCKAccuracy'} <= set(registries.METRICS.module_dict)


def test_coco_metric(mmpose: Any, shared_data: Path) -> None:
    results = evaluate_coco(shared_data)
    assert len(results) == 10
    assert 0.3 < results['coco/AP'] < 1


def test_mpii_metric(mmpose: Any) -> None:
    from mmpose.evaluation.metrics import MpiiPCKAccuracy

    rng = np.random.default_rng(0)
    metric = MpiiPCKAccuracy(thr=0.5, norm_item='head')
    for number in range(4):
        points = rng.random((1, 16, 2)) * 100
        truth = {'keypoints': points, 'keypoints_visible': np.ones((1, 16), dtype=bool)}
        truth |= {'head_size': np.array([20.0]), 'bboxes': np.array([[0, 0, 100, 100]])}
        sample = {'pred_instances': {'keypoints': points + 5.0 * (number % 2)}, 'gt_instances': truth}
        metric.process([], [sample])
    assert metric.evaluate(size=4)['PCK'] == pytest.approx(100.0)


@pytest.mark.filterwarnings('ignore:Conversion of an array:DeprecationWarning')  # MMPose's int(array)
@pytest.mark.parametrize('backend', ['opencv', 'matplotlib'])
def test_visualizer(mmpose: Any, tmp_path: Path, backend: str) -> None:
    from mmengine.structures import InstanceData
    from mmpose.structures import PoseDataSample
    from mmpose.visualization import PoseLocalVisualizer

    visualizer = PoseLocalVisualizer(name=f'compat_{backend}', radius=3)
    visualizer.backend = backend
    visualizer.set_dataset_meta(coco_description())
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    points = np.random.default_rng(0).random((1, 17, 2)) * 40 + 12
    sample = PoseDataSample()
    sample.pred_instances = InstanceData(keypoints=points, keypoint_scores=np.ones((1, 17)))
    file = tmp_path / 'drawn.png'
    visualizer.add_datasample('image', image, sample, draw_gt=False, out_file=str(file))
    drawn = visualizer.get_image()
    assert (drawn != 255).any()
    assert file.stat().st_size > 0


def test_canvas_in_pixels(mmpose: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.4, 0.2), dpi=100, facecolor=(1.0, 0.0, 0.2))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.frombuffer(canvas.tostring_rgb(), dtype=np.uint8).reshape(20, 40, 3)
    assert (pixels == (255, 0, 51)).all()


@pytest.mark.parametrize('missing', [True, False])
def test_canvas_is_changed_only_where_needed(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    class Canvas:
        pass

    if not missing:
        Canvas.tostring_rgb = 'original'  # type: ignore[attr-defined]
    backend = SimpleNamespace(FigureCanvasAgg=Canvas)
    monkeypatch.setattr(mmpose_imports, 'importlib', SimpleNamespace(import_module=lambda name: backend))
    found = mmpose_imports.fix_canvas.patch('mmpose.visualization.local_visualizer_3d')
    assert (Canvas.tostring_rgb != 'original') is missing  # type: ignore[attr-defined]
    assert (found is not None) is missing


def test_arrays_of_bfloat16(mmpose: Any) -> None:
    heads = importlib.import_module('mmpose.models.heads.coord_cls_heads.simcc_head')
    low, high = torch.tensor([0.5, -2.0], dtype=torch.bfloat16), torch.tensor([3.0])
    single = heads.to_numpy(low)
    assert (single.dtype, single.tolist()) == (np.dtype('float32'), [0.5, -2.0])
    pair, device = heads.to_numpy((low, high), return_device=True)
    assert ([array.tolist() for array in pair], device.type) == ([[0.5, -2.0], [3.0]], 'cpu')
    ((first, second),) = heads.to_numpy((low[None], high[None]), unzip=True)
    assert (first.tolist(), second.tolist()) == ([[0.5, -2.0]], [[3.0]])
    array = np.ones(2)
    assert heads.to_numpy(array) is array
    with pytest.raises(ValueError, match='Invalid input type'):
        heads.to_numpy('text')


@pytest.mark.parametrize('works', [True, False])
def test_to_numpy_is_replaced_only_where_it_fails(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    def to_numpy(x: torch.Tensor, return_device: bool = False, unzip: bool = False) -> Any:
        return (x.float() if works else x).numpy()

    module = SimpleNamespace(to_numpy=to_numpy)
    monkeypatch.setattr(mmpose_imports, 'importlib', SimpleNamespace(import_module=lambda name: module))
    found = mmpose_imports.fix_bfloat16.patch('mmpose.models')
    assert (module.to_numpy is to_numpy) is works
    assert (found is None) is works
    assert module.to_numpy(torch.ones(1, dtype=torch.bfloat16)).tolist() == [1.0]


def test_visualizer_in_three_dimensions(mmpose: Any) -> None:
    from mmengine.structures import InstanceData
    from mmpose.structures import PoseDataSample
    from mmpose.visualization import Pose3dLocalVisualizer

    visualizer = Pose3dLocalVisualizer(name='compat_3d')
    visualizer.set_dataset_meta(coco_description())
    sample = PoseDataSample()
    points = np.random.default_rng(0).random((1, 17, 3))
    sample.pred_instances = InstanceData(keypoints=points, keypoint_scores=np.ones((1, 17)))
    sample.track_id = 1
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    visualizer.add_datasample('image', image, sample, det_data_sample=sample, draw_gt=False, draw_2d=False)
    assert (visualizer.get_image() != 255).any()
