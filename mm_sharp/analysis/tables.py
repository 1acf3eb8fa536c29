"""Tables as text, whose first line is the head; and files of figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells under each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = ['<', *'>' * len(widths[1:])]
    cells = ([f'{c:{f}{w}}' for c, f, w in zip(line, forms, widths, strict=True)] for line in lines)
    return '\n'.join(map('  '.join, cells))


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table in Markdown."""
    return f'| {" | ".join(cells)} |'


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A whole one."""
    head, *rows = lines
    return '\n'.join(map(markdown_row, (head, ['---'] * len(head), *rows)))


def markdown_columns(table: Mapping[str, Sequence[str]]) -> str:
    """The same of a table by columns."""
    return markdown_table([[*table], *zip(*table.values(), strict=True)])


def csv_text(rows: Collection[Mapping[str, Any]]) -> str:
    """Rows by column as CSV; an empty cell for what a row does not have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(chain(*rows)), restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(file: Path, content: Any) -> None:
    """Write what :mod:`json` knows, and the text of other objects; null in place of numbers that are not finite."""
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    file.write_text(json.dumps(plain, indent=2) + '\n', encoding='utf-8')
