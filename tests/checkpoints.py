"""What a checkpoint makes of a state, and the last one of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

TORCH_REFUSES_CODE = torch.__version__ >= (2, 6)


def through_disk(state: Any) -> Any:
    """``state`` saved, and loaded as this torch does it: from 2.6 on, what would run code is refused."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=TORCH_REFUSES_CODE)


def final_state(work_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load((work_dir / 'last_checkpoint').read_text().strip(), weights_only=True)
    return state


def assert_same_history(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert all(torch.equal(left[name][column], right[name][column]) for column in left[name])
