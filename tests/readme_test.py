"""README and docs/ are executable: generated parts are fresh, snippets run, commands exist."""

import pathlib
import re
import shlex
import shutil

import pytest
import yaml

from experiments import pictures, update_readme
from model.compress import recipe, registry

SHARED_FLAGS = ('common.py', 'training.py', 'arms.py', 'costs.py', 'carbon.py')
ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
RECIPES_PAGE = (ROOT / 'docs' / 'compressing.md').read_text()


def _blocks(language, text=README):
  found = re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
  return [body for name, body in found if name == language]


def test_readme_is_short():
  assert len(README.splitlines()) < 150


@pytest.mark.parametrize('file', sorted({part.file for part in update_readme.PARTS}))
def test_generated_parts_are_those_of_the_code_and_the_records(file):
  text = (ROOT / file).read_text()
  assert update_readme.render(file, text) == text


def test_pictures_of_records_are_those_of_the_records(tmp_path):
  results = ROOT / 'experiments' / 'results'
  pictures.update(results, check=True)
  for picture in pictures.PICTURES:
    assert f'](experiments/results/{picture.file})' in README
    rows = (results / picture.results).read_text().splitlines()
    (tmp_path / picture.results).write_text('\n'.join(rows[:-1]))
    shutil.copy(results / picture.file, tmp_path)
    with pytest.raises(ValueError, match=f'{picture.file} is out of date'):
      pictures.update(tmp_path, check=True)
    pictures.update(tmp_path, check=False)
    pictures.update(tmp_path, check=True)


def test_a_changed_number_is_noticed():
  page = (ROOT / 'docs' / 'embedded.md').read_text()
  number = re.search(r'\| `int8` \| (\d+\.\d+) \|', page)[1]
  assert update_readme.render('docs/embedded.md', page.replace(number, '1.234')) == page


def _anchors(page):
  """The names by which links reach the headings of a page."""
  headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
  return {re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', sorted((ROOT / 'docs').glob('*.md')), ids=lambda path: path.stem)
def test_pages_of_docs_are_linked_from_readme_and_link_to_files(path):
  assert f'](docs/{path.name})' in README
  for link in re.findall(r'\]\((?!http)([^)]+)\)', path.read_text()):
    name, _, anchor = link.partition('#')
    target = path.parent / name
    assert target.exists(), link
    assert not anchor or anchor in _anchors(target), link


def test_it_opens_with_the_two_commands():
  install_and_run, test = _blocks('')[0].splitlines()
  assert install_and_run == 'pip install -e . && python -m experiments.compress'
  assert test == "pip install -e '.[test]' && python -m pytest"
  assert test in (ROOT / '.ci' / 'run').read_text()


def _commands():
  pages = [path.read_text() for path in (ROOT / 'docs').glob('*.md')]
  return [
    line.partition('#')[0].strip()
    for body in [*_blocks('')[1:], *(body for page in pages for body in _blocks('', page))]
    for line in body.splitlines()
    if line.startswith('python -m experiments.')
  ]


@pytest.mark.parametrize('command', _commands())
def test_every_flag_of_a_command_exists(command):
  words = shlex.split(command)
  name = words[2].removeprefix('experiments.')
  source = (ROOT / 'experiments' / f'{name}.py').read_text()
  shared = ''.join((ROOT / 'experiments' / name).read_text() for name in SHARED_FLAGS)
  for word in words[3:]:
    if not word.startswith('--'):
      assert 'takes_arguments=True' in source, word
      continue
    flag = word.removeprefix('--').partition('=')[0]
    known = re.search(rf"'{flag}'", source + shared)
    assert known or (flag.startswith('mesh_') and 'mesh_{axis}' in shared), flag


def test_the_pruning_score_runs_in_a_recipe():
  (snippet,) = [body for body in _blocks('python') if 'pruning_score' in body]
  try:
    exec(snippet, {})
    step = recipe.parse({'name': 'r', 'steps': [{'noisy': {'n': 2, 'm': 4}}]}).steps[0]
    assert step.row.statistics == ('input_norm',)
  finally:
    registry.TECHNIQUES.pop('noisy', None)


def test_the_recipe_is_the_one_of_the_folder():
  snippet, *others = _blocks('yaml', RECIPES_PAGE)
  for other in others:
    recipe.parse(yaml.safe_load(other))
  own = recipe.load(ROOT / 'experiments' / 'recipes' / 'wanda_2of4_int8.yaml')
  assert recipe.parse(yaml.safe_load(snippet)) == own
