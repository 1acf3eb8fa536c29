"""What the tests prove about faults, collected for docs/reliability.md.

A test says by its fixture ``holds`` what it has shown. With ``--reliability FILE`` the findings of the tests that pass
are appended to FILE as JSON lines, by any number of processes; :mod:`tests.reliability_page` makes the page of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

Holds = Callable[..., None]


@dataclass(frozen=True)
class Finding:
    """One fault that a test has put something through.

    Args:
        section: Heading on the page.
        fault: What was done.
        subject: To what: the wrapper's name as :data:`tests.wrappers.WRAPPERS` has it, or a program's.
        held: What was as it should be afterwards.
        count: How often it was tried.
        unit: What ``count`` counts, such as ``'faults injected'``: the page adds up each unit.
    """

    section: str
    fault: str
    subject: str
    held: str
    count: int = 1
    unit: str = 'faults injected'


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--reliability FILE``."""
    parser.addoption(
        '--reliability', type=Path, default=None, help='append what the tests prove about faults to a file'
    )


@pytest.fixture
def holds(request: pytest.FixtureRequest) -> Iterator[Holds]:
    """``holds(section, fault, subject, held, count=1, unit=...)``: see :class:`Finding`."""
    findings: list[Finding] = []
    yield lambda *args, **kwargs: findings.append(Finding(*args, **kwargs))
    file = request.config.getoption('--reliability')
    # Set by pytest_runtest_makereport in conftest.py.
    if file is not None and getattr(request.node, 'passed', False):
        with Path(file).open('a') as stream:
            stream.writelines(json.dumps(asdict(finding)) + '\n' for finding in findings)
