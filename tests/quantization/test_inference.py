"""MMPose's Python interface runs our configs and checkpoints, as docs/inference.md shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from torch.utils.data import DataLoader

from tests.conftest import ROOT
from tests.pages import blocks
from tests.tiny_data import NARROW_RECIPE, draw_coco
from tests.tiny_runs import make_runner

DEMO = sorted((ROOT / 'configs' / 'demo').glob('*.py'))
FLOAT = 'simcc_res18-half_ausam_demo-128x96.py'
# What the page uses: `make train`'s.
CONFIG = 'configs/demo/td-hm_lite0_ausam_b16-19e_demo-192x144.py'
CHECKPOINT = 'work_dirs/demo/ausam/epoch_19.pth'
W4A4 = 'simcc_res18-half_w4a4_ausam_demo-128x96.py'
POINTS = np.random.default_rng(0).uniform(10, 85, (1, 17, 2)).astype(np.float32)
EXAMPLES = blocks(ROOT / 'docs' / 'inference.md', 'python')
# MMPose's, of its own use of torch.
pytestmark = pytest.mark.filterwarnings('ignore:.*torch.cuda.amp.autocast.* is deprecated')


@pytest.fixture(scope='module')
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_coco(tmp_path_factory.mktemp('data') / 'demo', train=1, val=1) / 'val' / '000001.png'


@pytest.fixture(scope='module', params=[FLOAT, W4A4])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, picture: Path) -> dict[str, str]:
    """A narrow demo config and a checkpoint of random weights, calibrated if quantized; by the paths of the page."""
    from mmpose.apis import init_model

    folder = tmp_path_factory.mktemp('narrow')
    config, checkpoint = folder / 'narrow.py', folder / 'epoch_8.pth'
    base = ROOT / 'configs' / 'demo' / request.param
    config.write_text(NARROW_RECIPE.format(base=base, data=picture.parents[1], width=8))
    torch.manual_seed(0)
    if request.param == W4A4:
        pytest.importorskip('brevitas', reason='needs the extra: pip install mm_sharp[quant]')
        from mm_sharp.quantization import calibrate

        model = init_model(str(config), device='cpu')
        calibrate(model, [pseudo_collate([_sample(model, picture)])])
    else:
        model = init_model(str(config), device='cpu')
    save_as_a_run_does(model, checkpoint)
    return {
        CONFIG: str(config),
        CHECKPOINT: str(checkpoint),
        'data/demo/val/000001.png': str(picture),
        'work_dirs/demo/inference': str(folder / 'inference'),
    }


def save_as_a_run_does(model: Any, checkpoint: Path) -> None:
    """Save a model by a Runner of ours that trains on its config's data set."""
    from mmpose.registry import DATASETS

    dataset = DATASETS.build(model.cfg.train_dataloader.dataset)
    runner = make_runner(checkpoint.parent, model=model, train_dataloader=DataLoader(dataset, batch_size=1))
    runner._train_loop = runner.build_train_loop(runner._train_loop)  # as Runner.train() does first
    runner.save_checkpoint(str(checkpoint.parent), checkpoint.name, save_optimizer=False, save_param_scheduler=False)


def _sample(model: Any, picture: Path) -> Any:
    from mmengine.dataset import Compose

    box = {'bbox': np.float32([[0, 0, 96, 128]]), 'bbox_score': np.ones(1, np.float32)}
    pipeline = Compose(model.cfg.test_dataloader.dataset.pipeline)
    return pipeline({'img_path': str(picture), **box, **model.dataset_meta})


def run(example: str, paths: dict[str, str]) -> dict[str, Any]:
    """Run an example of the page on other paths; returns its variables."""
    for path, other in paths.items():
        example = example.replace(path, other)
    variables: dict[str, Any] = {}
    exec(example, variables)
    return variables


@pytest.mark.slow
def test_the_examples_find_the_same_keypoints(trained: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    inferencer, topdown = (run(example, trained) for example in EXAMPLES)
    capsys.readouterr()
    (person,) = inferencer['result']['predictions'][0]
    assert np.allclose(person['bbox'], [[0, 0, 96, 128]])
    assert np.isfinite(person['keypoints']).all()
    model = topdown['model']
    (alone,) = topdown['inference_topdown'](model, trained['data/demo/val/000001.png'], [[0, 0, 96, 128]])
    assert np.array_equal(person['keypoints'], alone.pred_instances.keypoints[0])
    assert np.array_equal(person['keypoint_scores'], alone.pred_instances.keypoint_scores[0])
    assert len({float(x) for x in alone.pred_instances.keypoints[0].flat}) > 5, 'all keypoints are in one place'
    written = Path(trained['work_dirs/demo/inference'])
    assert (written / 'predictions' / '000001.json').is_file()
    assert (written / 'visualizations' / '000001.png').is_file()


@pytest.mark.slow
def test_the_keypoints_are_drawn_in_the_data_sets_colours_without_mm_sharp(trained: dict[str, str]) -> None:
    """What MMPose reads of the checkpoint, it takes undecoded."""
    from mmpose.visualization import PoseLocalVisualizer

    content = torch.load(trained[CHECKPOINT], weights_only=True)
    found = content['meta']['dataset_meta']
    parsed = parse_pose_metainfo({'from_file': 'configs/_base_/datasets/coco.py'})
    for key in ('keypoint_colors', 'skeleton_link_colors', 'sigmas', 'dataset_keypoint_weights'):
        assert np.array_equal(np.asarray(found[key], parsed[key].dtype), parsed[key]), key
    pictures = []
    for meta in (parsed, found):
        visualizer = PoseLocalVisualizer(name=f'colours{len(pictures)}')
        visualizer.set_dataset_meta(meta)
        people = InstanceData(keypoints=POINTS, keypoint_scores=np.ones((1, 17)), keypoints_visible=np.ones((1, 17)))
        pictures.append(visualizer._draw_instances_kpts(np.zeros((128, 96, 3), np.uint8), people))
    assert pictures[0].any()
    assert np.array_equal(*pictures)


@pytest.mark.slow
def test_a_checkpoint_of_before_gives_its_colours(trained: dict[str, str], tmp_path: Path) -> None:
    """Its ``dataset_meta`` holds our dicts in place of arrays."""
    from mmpose.apis import init_model

    content = torch.load(trained[CHECKPOINT], weights_only=True)
    content['meta']['dataset_meta'] = content['meta'].pop('mm_sharp_dataset_meta')
    torch.save(content, tmp_path / 'before.pth')
    config = trained[CONFIG]
    model = init_model(config, str(tmp_path / 'before.pth'), device='cpu')
    parsed = parse_pose_metainfo({'from_file': 'configs/_base_/datasets/coco.py'})
    assert np.array_equal(model.dataset_meta['keypoint_colors'], parsed['keypoint_colors'])


@pytest.mark.parametrize('file', DEMO, ids=lambda file: file.stem)
def test_demo_configs_have_what_the_inferencer_reads(file: Path) -> None:
    cfg = Config.fromfile(file)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert (cfg.dataset_type, cfg.data_mode) == (loader.dataset.type, loader.dataset.data_mode)
