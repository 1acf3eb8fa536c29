"""The command ``mm-sharp``, also ``python -m mm_sharp``: runs a tool by its name, or lists them.

``mm-sharp train CONFIG`` is ``python tools/train.py CONFIG``, wherever the tools lie: an installation has them inside
the package. Neither torch nor MMEngine is imported here, so the list comes at once, and the doctor starts where they
are broken.
"""

from __future__ import annotations

import ast
import difflib
import os
import sys
from pathlib import Path

from mm_sharp import __version__

_PACKAGE = Path(__file__).parent
_DOCTOR = _PACKAGE / 'doctor.py'


def find_tools() -> dict[str, Path]:
    """The files of the tools by name: ``analyze-sharpness`` is ``analyze_sharpness.py``."""
    files = (_PACKAGE / '.mim' / 'tools').rglob('*.py')
    return {file.stem.replace('_', '-'): file for file in sorted([*files, _DOCTOR], key=lambda file: file.stem)}


def main() -> int:
    """Replace this process by that of a tool; else print the list, or what is wrong, and return the exit status."""
    tools, (name, *arguments) = find_tools(), sys.argv[1:] or ['--help']
    if name in ('-h', '--help'):
        sys.stdout.write('usage: mm-sharp TOOL [ARGUMENT ...]; for the arguments: mm-sharp TOOL --help\n\n')
        for known, file in tools.items():
            about = (ast.get_docstring(ast.parse(file.read_text('utf-8'))) or '').partition('\n')[0]
            sys.stdout.write(f'  {known:<20} {about}\n')
        return 0
    if name == '--version':
        sys.stdout.write(f'mm_sharp {__version__}\n')
        return 0
    tool = tools.get(name.replace('_', '-'))
    if tool is not None:
        # As a module: beside the doctor's file, folders of the package would hide others of the same name.
        program = ['-m', 'mm_sharp.doctor'] if tool == _DOCTOR else [str(tool)]
        os.execv(sys.executable, [sys.executable, *program, *arguments])
    close = difflib.get_close_matches(name, tools, 1)
    hint = f'did you mean {close[0]!r}?' if close else f'there are {", ".join(tools)}'
    sys.stderr.write(f'mm-sharp: error: no tool {name!r}; {hint}\n')
    return 2


if __name__ == '__main__':
    sys.exit(main())
