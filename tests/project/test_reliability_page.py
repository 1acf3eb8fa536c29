"""The page of faults is made of what the tests have found, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.reliability import Finding
from tests.reliability_page import MARK, main, page, read

FINDINGS = [
    Finding('Faults', 'a', 'sam', 'weights', count=3),
    Finding('Faults', 'a', 'ausam', 'weights'),
    Finding('Faults', 'a', 'esam', 'buffers'),
    Finding('Faults', 'b', 'esam', 'buffers'),
    Finding('Kills', 'SIGKILL', 'sam', 'weights', count=1200, unit='kills survived'),
]
TABLES = """
| tried | |
|---|---|
| faults injected | 6 |
| kills survived | 1,200 |

## Faults

| fault | done to | what held | times |
|---|---|---|---|
| a<br>b | esam | buffers | 1 each |
| a | ausam; sam | weights | 4 |

## Kills

| fault | done to | what held | times |
|---|---|---|---|
| SIGKILL | sam | weights | 1,200 |
"""


def test_tables() -> None:
    assert page(f'# Title\n\nText.\n\n{MARK}\n\nold\n', FINDINGS) == f'# Title\n\nText.\n\n{MARK}\n{TABLES}'


def test_without_mark_or_findings() -> None:
    for text, findings in (('# Title\n', FINDINGS), (MARK, [])):
        with pytest.raises(ValueError, match='needs the line'):
            page(text, findings)


TESTS = """
import pytest

@pytest.mark.parametrize('fails', [False, True])
def test_one(fails, holds):
    holds('Faults', f'fails={fails}', 'sam', 'weights', count=2)
    assert not fails
"""


def test_only_tests_that_pass_have_found_something(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('from tests.conftest import holds, pytest_addoption, pytest_runtest_makereport')
    pytester.makepyfile(TESTS)
    for _ in range(2):
        pytester.runpytest('--reliability', 'found.jsonl').assert_outcomes(passed=1, failed=1)
    assert read(pytester.path / 'found.jsonl') == [Finding('Faults', 'fails=False', 'sam', 'weights', count=2)] * 2
    pytester.path.joinpath('page.md').write_text(f'{MARK}\n')
    main([str(pytester.path / 'found.jsonl'), str(pytester.path / 'page.md')])
    assert '| fails=False | sam | weights | 4 |' in (pytester.path / 'page.md').read_text()


def test_the_page_is_a_made_one() -> None:
    text = Path(ROOT / 'docs' / 'reliability.md').read_text()
    made = text[text.index(MARK) :]
    for section in ('Bad configs', 'Faults in a step', 'Kills', 'Long runs', 'Ranks', 'Values that are not finite'):
        assert f'\n## {section}\n' in made
