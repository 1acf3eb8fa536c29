"""Processes end with the one that started them: the ranks of a distributed run, the workers of a study (ours).

torchrun ends its processes when one of them fails, or when it is told to end. If it is itself killed (by SIGKILL, or
by the system where memory is short), they would go on, and write into the folder of the run that is resumed in their
place; so would the workers of a study, into the table of its next start.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_SECONDS = 1.0


def end_with_launcher() -> None:
    """Have this process end by SIGTERM soon after torchrun, if that started it; otherwise nothing happens."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and hasattr(os, 'getppid'):
        end_with_parent()


def end_with_parent() -> None:
    """Have this process end by SIGTERM soon after the one that started it."""
    threading.Thread(target=_watch, args=(os.getppid(),), name='launcher watch', daemon=True).start()


def _watch(launcher: int) -> None:
    # A process whose parent has ended gets another.
    while os.getppid() == launcher:
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
