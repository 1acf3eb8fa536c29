"""What the site has beside ``docs/``: the README, the cards beside the configs, and the files that pages link to.

On the site, ``docs/`` is the top folder and everything else is where it is in the project. So a link works on the site
and in the project alike, once the hooks below have moved it by this one rule.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(?<=\]\()(?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?)(?=\))')
SHOWN = {'.py': 'python', '.yaml': 'yaml', '.yml': 'yaml', '.cff': 'yaml', '.toml': 'toml'}


def place(source: str) -> str:
    """Where a file of the project is on the site: ``docs/scale.md`` is ``scale.md``, a config a page that shows it."""
    if source == 'README.md':
        return 'index.md'
    if source.startswith('docs/'):
        return source.removeprefix('docs/')
    return source if source.endswith('.md') else f'{source}.md'


def source_of(page: str) -> str:
    """The file of the project that a page of the site is made of: the inverse of `place`."""
    if page == 'index.md':
        return 'README.md'
    if (ROOT / 'docs' / page).is_file():
        return f'docs/{page}'
    return page if (ROOT / page).is_file() else page.removesuffix('.md')


def targets(text: str, source: str) -> list[str]:
    """The files of the project that the links of a page lead to."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link, _ in LINK.findall(text)]


def moved(text: str, source: str) -> str:
    """A page's text, its links made those of the site."""
    folder = posixpath.dirname(place(source)) or '.'

    def move(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return posixpath.relpath(place(target), folder) + match[2]

    return LINK.sub(move, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the cards, and a page for each config or other file that one of the pages links to."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = ['README.md', *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob('configs/*/README.md')))]
    for source in pages:
        files.append(File.generated(config, place(source), content=(ROOT / source).read_text()))
    pages += [source_of(file.src_uri) for file in files.documentation_pages() if not file.generated_by]
    linked = {target for source in pages for target in targets((ROOT / source).read_text(), source)}
    for source in sorted(linked - set(pages)):
        path = ROOT / source
        if source.startswith('docs/') or path.suffix not in {'.md', *SHOWN} or not path.is_file():
            continue  # MkDocs itself has what is in docs/, and says what does not exist
        text = path.read_text()
        if path.suffix != '.md':
            code = f'~~~~{SHOWN[path.suffix]}\n{text}~~~~'
            text = f'---\nsearch: {{exclude: true}}\n---\n# {path.name}\n\n`{source}`\n\n{code}\n'
        files.append(File.generated(config, place(source), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Move the links of a page to where the site has their files."""
    source = source_of(page.file.src_uri)
    return moved(markdown, source) if source.endswith('.md') else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings say :class:`X`, of which only the name is shown, and put two colons before an example."""
    html = re.sub(r':(?:class|func|meth|mod|attr|data|exc):(?=<code>)', '', html)
    return re.sub(r'::(?=</p>\s*<(?:div|pre)\b)', ':', html)
