"""The packages that exporting needs and training does not: an error that names the extra if one is missing (ours)."""

from __future__ import annotations

import importlib


def require(purpose: str, *packages: str) -> None:
    """Check that packages can be imported.

    Args:
        purpose: What needs them, to begin a sentence with.
        *packages: Their import names.

    Raises:
        ImportError: Some cannot be; the message says how to install them.
    """
    missing, broken = [], []
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            missing.append(package if error.name == package else f'{package} (for {error.name})')
        except Exception as error:  # onnx raises AttributeError where ml_dtypes is too old, for one
            broken.append(f'{package} ({type(error).__name__}: {error})')
    faults = [
        f'{", ".join(names)} {fault}'
        for names, fault in ((missing, 'not installed'), (broken, 'installed, but cannot be imported'))
        if names
    ]
    if faults:
        raise ImportError(f'{purpose} needs {" and ".join(packages)}; {"; ".join(faults)}: pip install mm_sharp[quant]')
