"""Processes of a distributed run end with the launcher that started them (ours).

torchrun ends its processes when one of them fails, or when it is told to end. If it is itself killed (by SIGKILL, or
by the system where memory is short), they would go on, and write into the folder of the run that is resumed in their
place.
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
        watch = threading.Thread(target=_watch, args=(os.getppid(),), name='launcher watch', daemon=True)
        watch.start()


def _watch(launcher: int) -> None:
    # A process whose parent has ended gets another.
    while os.getppid() == launcher:
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
