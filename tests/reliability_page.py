"""Writes the tables of docs/reliability.md from what the tests have found: ``make reliability``.

python -m tests.reliability_page FINDINGS.jsonl docs/reliability.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.reliability import Finding

MARK = '<!-- Below this line: written by `make reliability`. -->'


def read(file: Path) -> list[Finding]:
    """The findings in a file of JSON lines."""
    return [Finding(**json.loads(line)) for line in file.read_text().splitlines()]


def page(text: str, findings: Sequence[Finding]) -> str:
    """A page with everything below the mark made anew.

    Args:
        text: The page as it is.
        findings: What the tests have found.

    Raises:
        ValueError: The page has no mark, or there are no findings.
    """
    if MARK not in text or not findings:
        raise ValueError(f'the page needs the line {MARK!r}, and the tests must have found something')
    parts = [text[: text.index(MARK)] + MARK, _figures(findings)]
    for section in dict.fromkeys(finding.section for finding in findings):
        parts.append(f'## {section}\n\n' + _table(finding for finding in findings if finding.section == section))
    return '\n\n'.join(parts) + '\n'


def _figures(findings: Sequence[Finding]) -> str:
    """How much was tried, by what is counted."""
    totals: dict[str, int] = {}
    for finding in findings:
        totals[finding.unit] = totals.get(finding.unit, 0) + finding.count
    return '\n'.join(['| tried | |', '|---|---|', *(f'| {unit} | {count:,} |' for unit, count in totals.items())])


def _table(findings: Iterable[Finding]) -> str:
    """A section's rows: what was done, what to, and with which outcome."""
    subjects: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for finding in findings:
        row = finding.fault, finding.held
        subjects.setdefault(row, []).append(finding.subject)
        counts[row] = counts.get(row, 0) + finding.count
    # What was done to the same subjects, as often and with the same outcome, shares a row.
    rows: dict[tuple[str, str, int], list[str]] = {}
    for (fault, held), names in sorted(subjects.items()):
        rows.setdefault(('; '.join(sorted(set(names))), held, counts[fault, held]), []).append(fault)
    lines = ['| fault | done to | what held | times |', '|---|---|---|---|']
    for (names, held, count), faults in rows.items():
        each = ' each' if len(faults) > 1 else ''
        lines.append(f'| {"<br>".join(faults)} | {names} | {held} | {count:,}{each} |')
    return '\n'.join(lines)


def main(arguments: Sequence[str]) -> None:
    """Rewrite the page."""
    findings, target = map(Path, arguments)
    # In an order that does not depend on which process was first.
    found = sorted(read(findings), key=lambda finding: (finding.section, finding.fault, finding.subject))
    target.write_text(page(target.read_text(), found))


if __name__ == '__main__':
    main(sys.argv[1:])
