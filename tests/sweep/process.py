"""Each model is tried in a process of its own: what crashes, hangs or changes a class ends with it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

# Before all forks: the imports of the packages take longer than most models.
import mmdet.models
import mmdet.testing  # noqa: F401
import mmpose.datasets
import mmpose.models  # noqa: F401
import mmpretrain.datasets
import mmpretrain.models  # noqa: F401
import torch

from tests.sweep import operators
from tests.sweep.recipes import Recipe, root
from tests.sweep.trial import trial

LIMIT = 60  # seconds of the processor for a model
MEMORY = 12 * 2**30  # bytes of its addresses


def attempt(recipe: Recipe, methods: Sequence[str] = ('SAM',), limit: int = LIMIT) -> dict[str, Any]:
    """What :func:`tests.sweep.trial.trial` gives for a recipe, or the reason why its process has ended."""
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, recipe, methods, limit), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(10 * limit):
            return ours.recv()  # type: ignore[no-any-return]
        return {'error': 'hangs'}
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return {'error': f'takes more than {limit} s'}
        return {'error': f'the process ended with code {process.exitcode}'}
    finally:
        process.kill()
        process.join()


def _child(pipe: Connection, recipe: Recipe, methods: Sequence[str], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    sys.stdout = sys.stderr = open(os.devnull, 'w')  # noqa: SIM115  # for as long as the process lives
    operators.install()
    os.chdir(root(recipe.package).parent)  # some configs name others from there
    pipe.send(trial(recipe, methods))
