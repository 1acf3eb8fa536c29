"""Print versions, the state of every fix, and for each problem a command that ends it.

The exit status is 1 if something essential is broken, else 0. It must run where packages are missing or broken: what is
not in the standard library is imported piece by piece, and what fails becomes a line of the report.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any, NamedTuple

OPENCV = ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless')
# What is reported, in this order.
DISTRIBUTIONS = (
    *('mm_sharp', 'torch', 'torchvision', 'mmengine', 'mmcv', 'mmcv-lite', 'mmdet', 'mmpose', 'numpy', *OPENCV),
    *('setuptools', 'xtcocotools', 'faster-coco-eval', 'mmpretrain', 'brevitas', 'onnx', 'onnxruntime', 'qonnx'),
)  # fmt: skip
# By distribution, modules whose import shows whether it works. With MMPose's modules all of its registries load.
_MODULES = {
    **{name: (name,) for name in ('torch', 'numpy', 'torchvision', 'mmdet', 'brevitas', 'onnx', 'onnxruntime')},
    'mmengine': ('mmengine.runner',), 'mm_sharp': ('mm_sharp.methods.sam',), 'mmpretrain': ('mmpretrain.models',),
    'mmpose': ('cv2', 'mmcv', 'mmpose.datasets', 'mmpose.models', 'mmpose.evaluation', 'mmpose.visualization',
        'mmpose.engine'),
}  # fmt: skip
_INSTALLED_AS = {'cv2': '"opencv-python-headless<4.12"', 'mmcv': '"mmcv-lite>=2.0.0,<2.2.0"'}
# fmt: off
# When, what is wrong then, and what to type. «!name»: it is not installed; {name}: its version.
_BROKEN = (
    ('python<3.10', 'Python {python} is too old, 3.10 is needed', 'python3.11 -m venv .venv'),
    ('!torch', 'torch is missing, which mm_sharp needs', 'pip install "torch>=2.1"'),
    ('torch<2.1', 'torch {torch} is too old, 2.1 is needed', 'pip install --upgrade "torch>=2.1"'),
    ('!mmengine', 'mmengine is missing, which mm_sharp needs', 'pip install "mmengine>=0.10"'),
    ('mmengine<0.10', 'mmengine {mmengine} is too old, 0.10 is needed', 'pip install --upgrade "mmengine>=0.10"'),
    ('mmpose !torchvision', 'torchvision is missing, which MMPose needs', 'pip install torchvision'),
    ('mmpose !mmcv !mmcv-lite', 'mmcv is missing, which MMPose needs', f'pip install {_INSTALLED_AS["mmcv"]}'),
    (f'mmpose !{" !".join(OPENCV)}', 'OpenCV is missing, which MMPose needs', f'pip install {_INSTALLED_AS["cv2"]}'),
    ('mmcv mmcv-lite', 'mmcv and mmcv-lite are both installed and overwrite each other',
        f'pip uninstall -y mmcv mmcv-lite && pip install {_INSTALLED_AS["mmcv"]}'),
    *((f'{name}>=2.2 mmdet<3.4', f'{name} {{{name}}} is too new for mmdet {{mmdet}}, which refuses it at import',
        f'pip install "{name}>=2.0.0,<2.2.0"') for name in ('mmcv', 'mmcv-lite')),
    *((f'{name}>=4.12 numpy<2', f'{name} {{{name}}} needs numpy 2 and numpy is {{numpy}}',
        f'pip install "{name}<4.12"') for name in OPENCV),
    *((f'mmpose !xtcocotools !faster-coco-eval python{which}3.12',
        'neither xtcocotools nor faster-coco-eval is installed, and MMPose needs one of them',
        f'pip install {package}') for which, package in (('<', 'xtcocotools'), ('>=', 'faster-coco-eval'))),
    ('mmpose numpy>=2 xtcocotools<1.15 !faster-coco-eval', 'xtcocotools {xtcocotools} is compiled against numpy 1 and '
        'numpy is {numpy}', 'pip install faster-coco-eval'),
    ('!setuptools python>=3.12', 'setuptools is missing, and with it distutils, which MMEngine needs',
        'pip install "setuptools<81"'),
)
_NOTES = (
    ('!mmpose', 'mmpose is missing: SAM works with other MMEngine models, the pose configs do not',
        'pip install "mm_sharp[pose]" && pip install --no-deps mmpose==1.3.2'),
    ('mmpose !mmdet', 'mmdet is missing: RTMO, EDPose and detection before pose do not work',
        'pip install "mmdet>=3.0.0,<3.4.0"'),
)
# fmt: on
Versions = Mapping[str, 'str | None']


class Problem(NamedTuple):
    """Something to change: what is wrong, what to type, and whether mm_sharp or MMPose cannot work like this."""

    text: str
    command: str
    essential: bool = True


def diagnose(versions: Versions) -> list[Problem]:
    """What is wrong with what :func:`read_versions` has found; the essential problems come first."""
    found = [
        Problem(text.format(**versions), command, rules is _BROKEN)
        for rules in (_BROKEN, _NOTES)
        for when, text, command in rules
        if all(_holds(term, versions) for term in when.split())
    ]
    builds = ' '.join(name for name in OPENCV if versions.get(name))
    if ' ' in builds:
        text = f'several builds of OpenCV are installed and overwrite each other: {builds}'
        found.append(Problem(text, f'pip uninstall -y {builds} && pip install {_INSTALLED_AS["cv2"]}', False))
    torch, vision = parse(versions.get('torch')), parse(versions.get('torchvision'))
    # torchvision 0.15 belongs to torch 2.0, and so on.
    if torch[:1] == (2,) and vision[:1] == (0,) and vision[1] != torch[1] + 15:
        text = f'torchvision {versions["torchvision"]} belongs to another torch than {versions["torch"]}'
        found.append(Problem(text, f'pip install "torchvision==0.{torch[1] + 15}.*"', False))
    return found


def _holds(term: str, versions: Versions) -> bool:
    """Whether ``'!name'``, ``'name'``, ``'name<1.2'`` or ``'name>=1.2'`` is true of what is installed."""
    name, comparison, limit = re.fullmatch(r'(!?[\w-]+)(<|>=)?(.*)', term).groups()  # type: ignore[union-attr]
    if name.startswith('!'):
        return not versions.get(name[1:])
    version = parse(versions.get(name))
    return bool(version) and (comparison is None or (version < parse(limit)) == (comparison == '<'))


def parse(version: str | None) -> tuple[int, ...]:
    """The numbers at the start of a version: ``'2.13.0+cpu'`` is (2, 13, 0), and what has none is ()."""
    match = re.match(r'\d+(\.\d+)*', version or '')
    return tuple(int(number) for number in match[0].split('.')) if match else ()


def read_versions() -> dict[str, str | None]:
    """The installed version of each distribution and of ``python``; None for what is missing."""
    versions: dict[str, str | None] = {'python': platform.python_version(), **dict.fromkeys(DISTRIBUTIONS)}
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def try_imports(versions: Versions, load: Callable[[str], Any] = importlib.import_module) -> list[Problem]:
    """Import by ``load`` what is installed; a problem for each module that fails, and none for those that need it."""
    found: dict[str, Problem] = {}
    for module in (module for name, modules in _MODULES.items() if versions.get(name) for module in modules):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                load(module)
        except Exception as error:
            cause = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
            package = module.partition('.')[0]
            command = f'pip install --force-reinstall --no-deps {_INSTALLED_AS.get(package, package)}'
            found.setdefault(cause, Problem(f'{module} does not import ({cause})', command))
    return list(found.values())


def describe_devices() -> str:
    """What torch computes on, in words."""
    try:
        import torch

        if not torch.cuda.is_available():
            return f'CPU, {torch.get_num_threads()} threads (torch is built for CUDA {torch.version.cuda})'
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f'CUDA {torch.version.cuda}: {", ".join(names)}'
    except Exception as error:  # a torch that is missing or broken is reported as a problem
        return f'unknown ({type(error).__name__})'


def list_fixes() -> list[str]:
    """A line for every fix of ``mm_sharp.compat``, or one that says why they can't be listed."""
    try:
        from mm_sharp import compat

        compat.apply()
        lines = {True: '[active] {0.name}: {0.reason} (until: {0.ends_with})', False: '[  -   ] {0.name}: {0.reason}'}
        return [lines[fix.active].format(fix) for fix in compat.fixes()]
    except Exception as error:
        return [f'cannot be listed: {type(error).__name__}: {error}']


def main() -> int:
    """Print the report; gives the exit status."""
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
