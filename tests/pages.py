"""The pages of the documentation."""

from __future__ import annotations

from pathlib import Path


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code blocks of a language ('' for those without)."""
    found: list[str] = []
    inside: str | None = None
    for line in page.read_text().splitlines(keepends=True):
        if not line.startswith('```'):
            if inside == language:
                found[-1] += line
        elif inside is None:
            inside = line[3:].strip()
            if inside == language:
                found.append('')
        else:
            inside = None
    return found
