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


@pytest.mark.slow
def test_of_a_quantized_models_config_the_float_model_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SIMCC.config().dump(tmp_path / 'narrow.py')
    (tmp_path / 'w4a4.py').write_text("_base_ = ['narrow.py', 'mm_sharp::_base_/quantization/w4a4.py']\n")
    monkeypatch.setattr(deployment_table, '_FILES', ())
    plain, quantized = (
        deployment_table.export_all(deployment_table.read_config(str(tmp_path / f'{name}.py')), tmp_path / name)
        for name in ('narrow', 'w4a4')
    )
    assert plain['float'].read_bytes() == quantized['float'].read_bytes()


def test_files_of_one_name_have_rows_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / folder / 'demo.py') for folder in ('a', 'b')]
    for width, file in enumerate(files):
        Path(file).parent.mkdir()
        Path(file).write_text(f'model = dict(width={width})\n')
    monkeypatch.setattr(latency, 'installed', list)
    monkeypatch.setattr(deployment_table, 'rows', lambda title, cfg, rounds: [[title, str(cfg.model.width), '']])
    deployment_table.main([*files, *files[:1]])
    lines = [[cell.strip() for cell in line.split('|')[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [[files[0], '0'], [files[1], '1'], [files[0], '0']]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.py'], "no config 'none.py'"),
        (['mmpose::none.py'], "no config 'mmpose::none.py'"),
        (['x.py', '--rounds', '0'], '--rounds 0: it must be at least 1'),
        (['bare.py'], r"'bare\.py' has no model = dict"),
        (['failing.py'], r"cannot read the config 'failing\.py': ZeroDivisionError"),
        (['list.json'], r"cannot read the config 'list\.json'"),
        (['weights.pth'], r"no config 'weights\.pth'"),
        (['folder.py'], r"no config 'folder\.py'"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {'bare.py': 'x = 1\n', 'failing.py': 'x = 1 / 0\n', 'list.json': '[1]\n', 'weights.pth': ''}
    for name, text in files.items():
        Path(name).write_text(text)
    Path('folder.py').mkdir()
    with pytest.raises(UsageError, match=message):
        deployment_table.main(arguments)
    assert not capsys.readouterr().out
