"""Makes docs/model_sweep.md of what the sweep has found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Found = dict[str, Any]

HEAD = """# The packages' models at rho = 0

At `rho = 0` a step of SAM is the base optimizer's, bit for bit. This must hold for models that keep state in their
forward, too: momentum teachers, queues, counters, random masks, batches that are changed in place. `make sweep`
tries it on models of MMPretrain, MMDetection and MMPose, and writes this page. It takes a config if its model has a
class (a backbone, a neck, a head, a loss, an assigner) that no config before has. With `ARGS=--every` it takes one
config for each set of classes.

Each model is made shallow: one layer a stage, or as many as its config allows. It is trained for two steps on small
pictures of noise, by `OptimWrapper` and by `SAMOptimWrapper(rho=0.0)`, from equal weights, seeds and batches. The
sweep compares parameters, buffers, all other tensors and numbers among the modules' attributes, the optimizer's
state, the logged losses, the batches, and the random state of torch, NumPy and Python. mmcv-lite lacks the
operators `nms`, `roi_align`, `deform_conv`, `modulated_deform_conv` and `masked_conv`, so stand-ins in plain torch
take their place."""
# What an error means, the first that fits.
_REASONS = {
    "only for inference|doesn't support .*train": 'only for inference',
    'MissingOperatorError': 'calls a compiled operator of MMCV that has no stand-in',
    'URLError|Connection|connect|huggingface|Hub|download': 'needs a download',
    'No module|not installed|ImportError|requires|install': 'needs a package that is not installed',
    'too large|takes more than|hangs|code -9': 'too large to be tried',
}
# Why a model is not equal, by a part of its config's path.
_CAUSES = {
    'swav/': 'its forward normalises a weight that is trained, and the second pass does it again: rounding '
    '([what is not put back](reliability.md))',
    'cae/': "its teacher is the student's equal in the first step, and is first seen to move in the second, which has "
    'no copies here: rounding; a training has them in its first ten steps',
}


def page(found: Sequence[Found], unread: dict[str, dict[str, str]], methods: Sequence[str]) -> str:
    """The page's text.

    Args:
        found: What :func:`tests.sweep.trial.trial` gave for each recipe, and its package, path and number alike.
        unread: For each package the configs that cannot be read, with their errors.
        methods: The methods tried, keys of :data:`tests.sweep.trial.METHODS`.
    """
    parts = [HEAD, _table(found, unread, methods)]
    for method in methods:
        different = [each for each in found if method in each and _verdict(each[method]) == 'differs']
        parts.append(f'## {method}: not equal\n\n' + (_list(different, method) or 'None.'))
        random = [each for each in found if method in each and _verdict(each[method]) == 'random']
        if random:
            parts.append(f'## {method}: not to be compared, for two runs without it differ\n\n' + _list(random, method))
    untried = [each for each in found if 'error' in each]
    for reason in (*_REASONS.values(), 'other'):
        some = [each for each in untried if _reason(each['error']) == reason]
        if some:
            parts.append(f'## Not tried: {reason}\n\n' + _list(some, 'error'))
    return '\n\n'.join(parts) + '\n'


def _table(found: Sequence[Found], unread: dict[str, dict[str, str]], methods: Sequence[str]) -> str:
    names = [f'{method}: {verdict}' for method in methods for verdict in ('equal', 'differs', 'random', 'refused')]
    names = [name for name in names if name != 'SAM: refused']
    lines = [
        f'| package | configs with their classes | tried | trained here | {" | ".join(names)} |',
        '|---' * (len(names) + 4) + '|',
    ]
    for package in dict.fromkeys(each['package'] for each in found):
        some = [each for each in found if each['package'] == package]
        tried = [each for each in some if 'error' not in each]
        said = [f'{method}: {_verdict(each[method])}' for each in tried for method in methods]
        configs = sum(each['alike'] for each in some)
        numbers = [configs, len(some), len(tried), *(said.count(name) for name in names)]
        lines.append(f'| {package} | ' + ' | '.join(map(str, numbers)) + ' |')
    unreadable = sum(map(len, unread.values()))
    return (
        '\n'.join(lines)
        + f'\n\n{unreadable} configs cannot be read by MMEngine; most inherit from files that are not shipped.'
    )


def _verdict(said: str) -> str:
    """Equal, refused by one of our own errors, different, or different from run to run without us, too."""
    if said == 'equal':
        return said
    if said.startswith('the base optimizer itself'):
        return 'random'
    return 'refused' if re.match('(PerSampleLoss|SampleId)Error', said) else 'differs'


def _reason(error: str) -> str:
    return next((reason for pattern, reason in _REASONS.items() if re.search(pattern, error)), 'other')


def _list(some: Iterable[Found], key: str) -> str:
    lines = []
    for each in some:
        # The packages' own folders, which a reader would look for among ours.
        said = re.sub(r"(?<=['\s])configs/", '', each[key])[:200]
        lines.append(f'- {each["package"]} `{each["path"]}`: {_cause(each["path"])}{said}')
    return '\n'.join(lines)


def _cause(path: str) -> str:
    return next((f'{cause}. ' for part, cause in _CAUSES.items() if part in path), '')
