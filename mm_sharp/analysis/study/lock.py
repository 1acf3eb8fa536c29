"""One process at a time makes the runs of a results folder (ours).

Two would train the same runs, and write over each other's rows. The operating system holds the lock, and lets go of it
when the process ends, whatever ends it: a lock that is left behind cannot be.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_sharp.errors import UsageError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process makes runs in ``folder``, on this machine or on another that shares the file system.

    The file ``.lock`` in it says who has the lock; it stays there. Where the system or the file system has no such
    locks (Windows, some network drives), a line says so, and the work goes on without.

    Raises:
        UsageError: Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / '.lock').open('a+') as stream:
        try:
            import fcntl  # only here: Windows has none, and configs import the package for its data sets, too

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise UsageError(
                f"{stream.read() or 'another process'} makes runs in '{folder}': wait for it or stop it, give another "
                '--out-dir, or see with --table what is there'
            ) from error
        except (ImportError, OSError) as error:
            sys.stderr.write(f"'{folder}' cannot be locked ({error}): start no second study in it\n")
        stream.truncate(0)
        stream.write(f'process {os.getpid()} on {socket.gethostname()}')
        stream.flush()
        yield
