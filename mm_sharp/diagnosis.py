"""What is wrong with a set of installed versions, and what ends it (ours; the reasons: ``mm_sharp.compat``).

Pure functions over a dict, and nothing but the standard library, so that every broken environment can be
tested and that ``mm_sharp.doctor`` works in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# The names under which OpenCV comes.
OPENCV = (
    *('opencv-python', 'opencv-python-headless'),
    *('opencv-contrib-python', 'opencv-contrib-python-headless'),
)  # fmt: skip

Versions = Mapping[str, str | None]


@dataclass(frozen=True)
class Problem:
    """Something to change.

    Attributes:
        text: what is wrong and what it leads to.
        command: what to type.
        essential: whether mm_sharp, or MMPose where it is installed, can't work like this.
    """

    text: str
    command: str
    essential: bool = True


def diagnose(versions: Versions) -> list[Problem]:
    """What is wrong with a set of versions.

    Args:
        versions: as ``read_versions`` returns them; a missing key counts as not installed.

    Returns:
        Problems, the essential ones first.
    """
    problems = [problem for rule in _RULES for problem in rule(versions)]
    return sorted(problems, key=lambda problem: not problem.essential)


def parse(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: ``'2.13.0+cpu'`` is (2, 13, 0).

    Raises:
        ValueError: it doesn't start with a number.
    """
    match = re.match(r'\d+(\.\d+)*', version)
    if match is None:
        raise ValueError(f'version={version!r} must start with a number, e.g. "2.13.0"')
    return tuple(int(number) for number in match[0].split('.'))


def _below(versions: Versions, name: str, limit: str) -> bool:
    """Whether ``name`` is installed in a version below ``limit``."""
    version = versions.get(name)
    return version is not None and parse(version) < parse(limit)


def _from(versions: Versions, name: str, limit: str) -> bool:
    """Whether ``name`` is installed in version ``limit`` or a later one."""
    version = versions.get(name)
    return version is not None and parse(version) >= parse(limit)


def _check_base(versions: Versions) -> list[Problem]:
    found = []
    python = versions.get('python') or ''
    if python and parse(python) < (3, 10):
        found.append(Problem(f'Python {python} is too old, 3.10 is needed', 'python3.11 -m venv .venv'))
    elif python and parse(python) >= (3, 13):
        found.append(
            Problem(f'Python {python} is untested (3.10 to 3.12 are)', 'python3.12 -m venv .venv', essential=False)
        )
    for name, oldest in (('torch', '2.1'), ('mmengine', '0.10')):
        if versions.get(name) is None:
            found.append(Problem(f'{name} is missing, which mm_sharp needs', f'pip install "{name}>={oldest}"'))
        elif _below(versions, name, oldest):
            found.append(
                Problem(
                    f'{name} {versions[name]} is too old, {oldest} is needed',
                    f'pip install --upgrade "{name}>={oldest}"',
                )
            )
    return found


def _check_torchvision(versions: Versions) -> list[Problem]:
    torch, vision = versions.get('torch'), versions.get('torchvision')
    if vision is None:
        if versions.get('mmpose') is None:
            return []
        return [Problem('torchvision is missing, which MMPose needs', 'pip install torchvision')]
    # torchvision 0.15 belongs to torch 2.0, and so on.
    if torch is None or parse(torch)[0] != 2 or parse(vision)[0] != 0:
        return []
    wanted = parse(torch)[1] + 15
    if parse(vision)[1] == wanted:
        return []
    return [
        Problem(
            f'torchvision {vision} belongs to another torch than {torch}',
            f'pip install "torchvision==0.{wanted}.*"',
            essential=False,
        )
    ]


def _check_mmpose(versions: Versions) -> list[Problem]:
    if versions.get('mmpose') is None:
        return [
            Problem(
                'mmpose is missing: SAM works with other MMEngine models, the pose configs do not',
                'pip install "mm_sharp[pose]" && pip install --no-deps mmpose==1.3.2',
                essential=False,
            )
        ]
    found = []
    if versions.get('mmcv') is None and versions.get('mmcv-lite') is None:
        found.append(Problem('mmcv is missing, which MMPose needs', 'pip install "mmcv-lite>=2.0.0,<2.2.0"'))
    if versions.get('mmdet') is None:
        found.append(
            Problem(
                'mmdet is missing: RTMO, EDPose and detection before pose do not work',
                'pip install "mmdet>=3.0.0,<3.4.0"',
                essential=False,
            )
        )
    if not any(versions.get(name) for name in OPENCV):
        found.append(Problem('OpenCV is missing, which MMPose needs', 'pip install "opencv-python-headless<4.12"'))
    return found


def _check_mmcv(versions: Versions) -> list[Problem]:
    found = []
    if versions.get('mmcv') and versions.get('mmcv-lite'):
        found.append(
            Problem(
                'mmcv and mmcv-lite are both installed and overwrite each other',
                'pip uninstall -y mmcv mmcv-lite && pip install "mmcv-lite>=2.0.0,<2.2.0"',
            )
        )
    for name in ('mmcv', 'mmcv-lite'):
        if _from(versions, name, '2.2.0') and _below(versions, 'mmdet', '3.4'):
            found.append(
                Problem(
                    f'{name} {versions[name]} is too new for mmdet {versions["mmdet"]}, which refuses it at import',
                    f'pip install "{name}>=2.0.0,<2.2.0"',
                )
            )
    return found


def _check_numpy(versions: Versions) -> list[Problem]:
    found = []
    for name in OPENCV:
        if _from(versions, name, '4.12') and _below(versions, 'numpy', '2'):
            found.append(
                Problem(
                    f'{name} {versions[name]} needs numpy 2 and numpy is {versions["numpy"]}',
                    f'pip install "{name}<4.12"',
                )
            )
    if len([name for name in OPENCV if versions.get(name)]) > 1:
        names = ' '.join(name for name in OPENCV if versions.get(name))
        found.append(
            Problem(
                f'several builds of OpenCV are installed and overwrite each other: {names}',
                f'pip uninstall -y {names} && pip install "opencv-python-headless<4.12"',
                essential=False,
            )
        )
    return found


def _check_coco(versions: Versions) -> list[Problem]:
    """xtcocotools, or faster-coco-eval in its place (MMPose's data sets need one of them)."""
    if versions.get('mmpose') is None:
        return []
    stand_in, python = versions.get('faster-coco-eval'), versions.get('python') or ''
    if versions.get('xtcocotools') is None:
        if stand_in is not None:
            return []
        has_wheel = python != '' and parse(python) < (3, 12)
        return [
            Problem(
                'neither xtcocotools nor faster-coco-eval is installed, and MMPose needs one of them',
                f'pip install {"xtcocotools" if has_wheel else "faster-coco-eval"}',
            )
        ]
    if _from(versions, 'numpy', '2') and _below(versions, 'xtcocotools', '1.15'):
        return [
            Problem(
                f'xtcocotools {versions["xtcocotools"]} is compiled against numpy 1 and numpy is '
                f'{versions["numpy"]}' + ('; faster-coco-eval stands in' if stand_in else ''),
                'pip install "numpy<2"' if stand_in else 'pip install faster-coco-eval',
                essential=stand_in is None,
            )
        ]
    return []


def _check_setuptools(versions: Versions) -> list[Problem]:
    if versions.get('setuptools') is not None and not _from(versions, 'setuptools', '81'):
        return []
    version = versions.get('setuptools')
    if version is None and parse(versions.get('python') or '0') >= (3, 12):
        # Python itself has no distutils any more; setuptools brings one, which MMEngine's Runner imports.
        return [
            Problem('setuptools is missing, and with it distutils, which MMEngine needs', 'pip install "setuptools<81"')
        ]
    found = 'setuptools is missing, and so is' if version is None else f'setuptools {version} no longer has'
    return [
        Problem(
            f'{found} pkg_resources, which MMEngine uses to inherit configs; mm_sharp does without',
            'pip install "setuptools<81"',
            essential=False,
        )
    ]


_RULES: tuple[Callable[[Versions], list[Problem]], ...] = (
    *(_check_base, _check_torchvision, _check_mmpose, _check_mmcv, _check_numpy, _check_coco),
    _check_setuptools,
)
