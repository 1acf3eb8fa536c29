"""Configs that do not use mm_sharp read the same with it and without."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from tests.config_digests import digests, digests_without_us
from tests.reliability import Holds

# How many configs the pinned versions ship, at least.
PACKAGES = {'mmpose': 464, 'mmpretrain': 846, 'mmdet': 869}
# What MMEngine says while it reads is the configs' own business.
pytestmark = pytest.mark.filterwarnings('ignore')

# Keys of ours, of the names that they had before, and of our tools, as another project might use them.
OTHERS_KEYS = (
    "quantization = dict(policy='int8')",
    "quantization = dict(policy='int8', calibration=dict(samples=16))",
    'quantization = dict(policy=dict(weights=4, activations=8), calibration=None)',
    'quantization = dict(policy=dict(), calibration=dict())',
    'quantization = [8, 4]',
    "quantization = 'int8'",
    'quantization = None',
    "data_hint, load_hint, compile, perturb = 3, ['x'], dict(backend='inductor'), True",
    "model = dict(type='QuantizedModel', net=dict(type='Net'), policy=dict(bits=4))",
    "model = dict(type='QuantizedModel', policy='int8')",
)
NEW_STYLE = """
from torch.nn import Linear, ReLU
model = dict(type=Linear, in_features=2, out_features=2)
optim_wrapper = dict(type=ReLU)
quantization = dict(type=ReLU, policy=Linear)
"""


def shipped(package: str) -> list[Path]:
    """The configs that an OpenMMLab package ships."""
    pytest.importorskip(package, reason=f'{package} is not installed')
    folder = Path(str(metadata.distribution(package).locate_file(package))) / '.mim' / 'configs'
    return sorted(folder.rglob('*.py'))


@pytest.mark.slow
@pytest.mark.parametrize('package', PACKAGES)
def test_some_of_the_configs_that_a_package_ships(package: str) -> None:
    files = shipped(package)[::60]
    assert len(files) >= 8
    assert digests(files) == digests_without_us(files)


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('package', PACKAGES)
def test_all_configs_that_a_package_ships(package: str, holds: Holds) -> None:
    files = shipped(package)
    ours = digests(files)
    assert ours == digests_without_us(files)
    assert len(ours) >= PACKAGES[package]
    assert sum(len(value) == 64 for value in ours.values()) >= 0.99 * len(ours), 'hardly any could be read'
    holds(
        "Other projects' configs",
        'mm_sharp is imported',
        package,
        'each reads as it does without',
        len(ours),
        'shipped configs read with and without us',
    )


def test_keys_of_our_names_in_other_projects_configs(tmp_path: Path) -> None:
    base = "model = dict(type='Net')\noptim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n"
    files = [tmp_path / f'{number}.py' for number in range(len(OTHERS_KEYS))]
    for file, line in zip(files, OTHERS_KEYS, strict=True):
        file.write_text(base + line)
    files.append(tmp_path / 'new_style.py')
    files[-1].write_text(NEW_STYLE)
    found = digests(files)
    assert found == digests_without_us(files)
    assert {len(value) for value in found.values()} == {64}, found
