"""The table of docs/deployment.md, of a narrow model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_sharp.errors import UsageError
from mm_sharp.quantization import latency
from tests.mmpose_cases import QUIET
from tests.quantized_models import SIMCC
from tools import deployment_table

pytestmark = QUIET


@pytest.mark.slow
def test_a_row_for_each_file_in_the_runtimes_that_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SIMCC.config().dump(tmp_path / 'narrow.py')
    monkeypatch.setattr(latency, 'installed', lambda: ['onnxruntime'])
    monkeypatch.setattr(deployment_table, '_FILES', deployment_table._FILES[-1:])
    deployment_table.main([str(tmp_path / 'narrow.py'), '--rounds', '1'])
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()]
    names, _, plain, packed = lines
    assert names == ['model', 'file', 'MB', 'ONNX Runtime, ms', 'times float', 'in integers']
    assert [len(line) for line in lines] == [6] * 4
    assert plain[:2] == ['narrow', 'float']
    assert plain[4:] == ['1.00', '0 of 21']
    assert packed[1].startswith('W4A8')
    count, of = packed[5].split(' of ')
    assert count == of != '0'  # all layers, whatever their number in the packed form
    assert not packed[5].startswith('0')
    assert 0 < float(packed[2]) <= float(plain[2])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.py'], "no config 'none.py'"),
        (['mmpose::none.py'], "no config 'mmpose::none.py'"),
        (['x.py', '--rounds', '0'], '--rounds 0: it must be at least 1'),
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deployment_table.main(arguments)
