"""``python -m mm_sharp.doctor``: what is installed, what is mended, and what to change (ours).

Prints versions, the state of every fix in ``mm_sharp.compat``, and for each problem a command that ends it.
The exit status is 1 if something essential is broken, else 0. It survives any missing or broken package: what
isn't in the standard library is imported piece by piece, and what fails becomes a line of the report.
"""

from __future__ import annotations

import importlib
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from mm_sharp.diagnosis import OPENCV, Problem, Versions, diagnose

# What is reported, in this order.
DISTRIBUTIONS = (
    *('mm_sharp', 'torch', 'torchvision', 'mmengine', 'mmcv', 'mmcv-lite', 'mmdet', 'mmpose', 'numpy', *OPENCV),
    *('setuptools', 'xtcocotools', 'faster-coco-eval', 'mmpretrain', 'brevitas', 'onnx', 'onnxruntime', 'qonnx'),
)  # fmt: skip
# Modules whose import shows whether a package works, if the distribution on the left is there. With MMPose's
# modules all of its registries load.
_IMPORTS = (
    *(('torch', 'torch'), ('numpy', 'numpy'), ('mmengine', 'mmengine.runner'), ('mm_sharp', 'mm_sharp.methods.sam')),
    *(('torchvision', 'torchvision'), ('mmpose', 'cv2'), ('mmpose', 'mmcv'), ('mmdet', 'mmdet')),
    *(('mmpose', f'mmpose.{part}') for part in ('datasets', 'models', 'evaluation', 'visualization', 'engine')),
    *(('mmpretrain', 'mmpretrain.models'), ('brevitas', 'brevitas'), ('onnx', 'onnx'), ('onnxruntime', 'onnxruntime')),
)  # fmt: skip
_INSTALLED_AS = {'cv2': '"opencv-python-headless<4.12"', 'mmcv': '"mmcv-lite<2.2.0"'}


def read_versions(names: Iterable[str] = DISTRIBUTIONS) -> dict[str, str | None]:
    """The installed version of each distribution and of ``python``; None for what is missing."""
    versions: dict[str, str | None] = {'python': platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def try_imports(versions: Versions, load: Callable[[str], Any] = importlib.import_module) -> list[Problem]:
    """Import what is installed; a problem for each module that fails, and none for those that need it.

    Args:
        versions: as ``read_versions`` returns them.
        load: how a module is imported.
    """
    found: list[Problem] = []
    causes: set[str] = set()
    for distribution, module in _IMPORTS:
        if versions.get(distribution) is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                load(module)
        except Exception as error:
            cause = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
            if cause not in causes:
                causes.add(cause)
                package = module.partition('.')[0]
                package = _INSTALLED_AS.get(package, package)
                command = f'pip install --force-reinstall --no-deps {package}'
                found.append(Problem(f'{module} does not import ({cause})', command))
    return found


def describe_devices() -> str:
    """What torch computes on, in words."""
    try:
        import torch

        if not torch.cuda.is_available():
            built = f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'
            return f'CPU, {torch.get_num_threads()} threads (torch is built {built})'
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f'CUDA {torch.version.cuda}: {", ".join(names)}'
    except Exception as error:  # a torch that is missing or broken is reported as a problem
        return f'unknown ({type(error).__name__})'


def list_fixes() -> list[str]:
    """A line for every fix of ``mm_sharp.compat``, or one that says why they can't be listed."""
    try:
        from mm_sharp import compat

        compat.apply()
        return [
            f'[{"active" if fix.active else "  -   "}] {fix.name}: {fix.reason}'
            + (f' (until: {fix.ends_with})' if fix.active else '')
            for fix in compat.fixes()
        ]
    except Exception as error:
        return [f'cannot be listed: {type(error).__name__}: {error}']


def main() -> int:
    """Print the report.

    Returns:
        The exit status: 1 if something essential is broken.
    """
    versions = read_versions()
    print('Versions')
    for name, version in versions.items():
        if version is not None or name not in OPENCV:
            print(f'  {name:<24} {version or "not installed"}')
    print(f'  {"computes on":<24} {describe_devices()}')
    print('\nFixes for this stack')
    for line in list_fixes():
        print(f'  {line}')
    problems = diagnose(versions)
    if not any(problem.essential for problem in problems):  # else imports only fail for the same reasons
        problems += try_imports(versions)
    print('\nProblems' if problems else '\nNo problems found.')
    for problem in problems:
        print(f'  {"BROKEN " if problem.essential else "note   "} {problem.text}\n          {problem.command}')
    return int(any(problem.essential for problem in problems))


if __name__ == '__main__':
    sys.exit(main())
