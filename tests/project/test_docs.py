"""What the documentation shows is true: examples run, configs load, commands and paths exist."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.model import BaseModel

import mm_sharp
from mm_sharp.step.wrapper import TwoPassOptimWrapper, registered_methods
from tests.conftest import ROOT
from tests.pages import blocks

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'configs').rglob('README.md')), *sorted((ROOT / 'docs').rglob('*.md'))]
# Triton comes with torch for GPUs alone.
NEEDS_TRITON = 'mm_sharp.ops.kernels'
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mm_sharp.__path__, 'mm_sharp.')
    if module.name != NEEDS_TRITON or importlib.util.find_spec('triton')
)


# Pages whose examples are no configs, and the tests that run them.
PROGRAMS = {
    'docs/deployment.md': 'tests/quantization/test_targets.py',
    'docs/export.md': 'tests/cli/test_draw_keypoints.py',
    'docs/extending.md': 'tests/project/test_extending.py',
    'docs/inference.md': 'tests/quantization/test_inference.py',
    'docs/per_sample_losses.md': 'tests/project/test_docs.py',
}
CONFIGS = [
    pytest.param(block, id=f'{page.relative_to(ROOT)}-{number}')
    for page in PAGES
    if page.relative_to(ROOT).as_posix() not in PROGRAMS
    for number, block in enumerate(blocks(page, 'python'))
    if 'optim_context' not in block  # a program, too
]


@pytest.mark.parametrize('module', MODULES)
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_there_is_an_example() -> None:
    assert doctest.testmod(importlib.import_module('mm_sharp.methods.sam')).attempted >= 5


@pytest.mark.parametrize('block', CONFIGS)
def test_config_examples_load_and_use_a_wrapper_of_ours(block: str, tmp_path: Path) -> None:
    (tmp_path / 'example.py').write_text(block)
    config = Config.fromfile(tmp_path / 'example.py')
    if 'optim_wrapper' not in block:
        return  # a line or two to add to a config
    assert any(name.partition('.')[0] == 'mm_sharp' for name in config.custom_imports.imports)
    if not config.get('sharp_optim_wrapper') and config.model.type == 'QuantizedModel':
        assert config.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper'  # fine-tuned with the base optimizer
    else:
        assert config.optim_wrapper.type in registered_methods()
    assert config.optim_wrapper.optimizer.type, "the recipe's optimizer is gone"


@pytest.mark.parametrize(('page', 'test'), PROGRAMS.items())
def test_programs_on_pages_are_run_by_a_test(page: str, test: str) -> None:
    assert blocks(ROOT / page, 'python')
    assert Path(page).name in (ROOT / test).read_text()


class Classifier(BaseModel):  # type: ignore[misc]
    """A model with an ``nn`` loss, as docs/per_sample_losses.md means it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.loss = torch.nn.CrossEntropyLoss()

    def forward(self, inputs: Any, data_samples: Any, mode: str) -> Any:
        return {'loss': self.loss(self.layer(inputs), data_samples)}


def test_the_example_of_per_sample_losses() -> None:
    (block,) = blocks(ROOT / 'docs/per_sample_losses.md', 'python')
    names = {'model': Classifier(), 'inputs': torch.randn(4, 3), 'data_samples': torch.tensor([0, 1, 1, 0])}
    exec(block, names)
    scores = names['model'].layer(names['inputs'])
    each = torch.nn.functional.cross_entropy(scores, names['data_samples'], reduction='none')
    torch.testing.assert_close(names['losses'], each.detach())


def test_the_training_loop_without_a_runner() -> None:
    class Model(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(super().forward(inputs), labels)

    (block,) = [block for block in blocks(ROOT / 'docs/get_started.md', 'python') if 'optim_context' in block]
    model, data = Model(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(*data).item()
    names = {'model': model, 'optimizer': optimizer, 'loader': [data] * 20}
    exec(block, names)
    assert model(*data).item() < first
    assert names['wrapper'].optimizer_steps == 20


def test_the_readmes_quantized_config_is_complete(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(ROOT / 'README.md', 'python') if 'quantization/' in block]
    (tmp_path / 'my_qat.py').write_text(block)
    config = Config.fromfile(tmp_path / 'my_qat.py')
    assert (config.model.type, config.model.model) == ('QuantizedModel', 'TopdownPoseEstimator')
    assert config.optim_wrapper.optimizer.type, "the recipe's optimizer is gone"
    assert config.load_from == 'float.pth'


def test_the_first_pages_show_both_ways_in() -> None:
    readme, start = (blocks(page, 'python') for page in (ROOT / 'README.md', ROOT / 'docs/get_started.md'))
    assert any('custom_imports' in block and 'optim_wrapper' in block for block in readme)
    assert sum('optim_wrapper =' in block for block in start) == 2
    assert any('mm_sharp::_base_/' in block for block in start)


def test_the_readme_is_short_and_says_how_to_test() -> None:
    readme = ROOT / 'README.md'
    assert readme.stat().st_size <= 8000
    commands = re.findall(r'^make [a-z-]+', (ROOT / '.ci/run').read_text(), flags=re.MULTILINE)
    assert commands
    assert all(re.search(rf'{command}(?![\w-])', readme.read_text()) for command in commands)


def anchors(page: Path) -> set[str]:
    """What ``#…`` in a link may be: the page's headings, as GitHub and the site write them."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for link, _, anchor in re.findall(r'\]\(([^)#]*)(#([^)]+))?\)', text):
        if '://' not in link:
            target = (page.parent / link) if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f'{link}#{anchor}'
    paths = re.findall(r'(?:tools|configs|tests|mm_sharp|requirements)/[\w./-]*[\w/]', text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_they_show(page: Path) -> None:
    sources = [path.read_text() for folder in ('tools', 'mm_sharp') for path in (ROOT / folder).rglob('*.py')]
    for block in blocks(page, 'bash'):
        for line in re.sub(r'\\\n\s*', '', block).splitlines():
            if re.search(r'tools/\w+\.(py|sh) ', line):
                for option in re.findall(r' (--[a-z-]+)', line.split('#')[0]):
                    assert any(f"'{option}'" in source for source in sources), f'{option} in: {line}'


@pytest.fixture(scope='module')
def site() -> ModuleType:
    """The site's hooks, which need no MkDocs to say where a file goes."""
    spec = importlib.util.spec_from_file_location('site_hooks', ROOT / 'docs/site_hooks.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_site_lead_to_the_same_files(page: Path, site: ModuleType) -> None:
    source = page.relative_to(ROOT).as_posix()
    assert site.source_of(site.place(source)) == source
    text = site.moved(page.read_text(), source)
    folder = posixpath.dirname(site.place(source))
    places = [posixpath.normpath(posixpath.join(folder, link)) for link, _ in site.LINK.findall(text)]
    assert places == [site.place(target) for target in site.targets(page.read_text(), source)]


def test_every_page_is_in_the_sites_navigation(site: ModuleType) -> None:
    pending, named = [yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']], []
    while pending:
        entry = pending.pop()
        if isinstance(entry, str):
            named.append(entry)
        else:
            pending += entry.values() if isinstance(entry, dict) else entry
    assert sorted(named) == sorted(site.place(page.relative_to(ROOT).as_posix()) for page in PAGES)


def test_the_tree_is_the_packages() -> None:
    (tree,) = [block for block in blocks(ROOT / 'docs/architecture.md', '') if block.startswith('mm_sharp/')]
    named = set(re.findall(r'^  (\w+\.py|\w+/)', tree.split('\nconfigs/')[0], flags=re.MULTILINE))
    files = {path.name for path in (ROOT / 'mm_sharp').glob('*.py')} - {'__init__.py'}
    folders = {path.name + '/' for path in (ROOT / 'mm_sharp').iterdir() if (path / '__init__.py').is_file()}
    assert named <= files | folders
    assert files | folders <= named, 'a new folder must be in the tree'


def test_every_public_name_is_registered_or_documented() -> None:
    reference = [line for page in (ROOT / 'docs/api').glob('*.md') for line in page.read_text().splitlines()]
    for name in set(mm_sharp.__all__) - {'__version__'}:
        module = getattr(mm_sharp, name).__module__
        assert {f'::: {module}', f'::: {module}.{name}'} & set(reference), name
    assert issubclass(mm_sharp.SAMOptimWrapper, TwoPassOptimWrapper)


def test_makefile_and_get_started_run_the_same_commands() -> None:
    """The commands without make are those that make runs, with its variables filled in."""
    makefile = (ROOT / 'Makefile').read_text()
    for variable in re.findall(r'^(\w+) := (.*)$', makefile, flags=re.MULTILINE) * 3:
        makefile = makefile.replace(f'$({variable[0]})', variable[1])
    makefile = makefile.replace('$(VENV)', '.venv').replace('$(CURDIR)', '$PWD').replace('$$', '$')
    makefile = re.sub(r' --disable-pip-version-check| -q|\\\n\s*| \$\(ARGS\)', '', makefile)
    (without_make,) = [block for block in blocks(ROOT / 'docs/get_started.md', 'bash') if '-m venv' in block]
    commands = [
        line.strip()
        for line in re.sub(r'\\\n\s*', '', without_make).splitlines()
        if line.startswith('.venv') and '&&' not in line
    ]
    assert len(commands) == 8
    missing = [command for command in commands if command not in makefile]
    assert not missing, missing
