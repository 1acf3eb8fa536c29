"""Tables as text; the first line is the head."""

from __future__ import annotations

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells under each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = ['<', *'>' * len(widths[1:])]
    cells = ([f'{c:{f}{w}}' for c, f, w in zip(line, forms, widths, strict=True)] for line in lines)
    return '\n'.join(map('  '.join, cells))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    head, *rows = lines
    return '\n'.join(f'| {" | ".join(line)} |' for line in (head, ['---'] * len(head), *rows))
