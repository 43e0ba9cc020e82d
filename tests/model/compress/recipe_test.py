"""Tests the shipped recipes, the round trip, and that invalid or unknown values are refused."""

import dataclasses
import pathlib

import pytest
import yaml

from experiments import lessons as lessons  # its techniques
from experiments.common import RECIPES
from model.compress import recipe, registry, techniques

FILES = sorted(RECIPES.glob('*'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path):
  one = recipe.load(path)
  assert path.suffix == '.yaml'
  assert one.name == path.stem
  assert one.description
  assert one == recipe.resolve(path.stem, RECIPES)
  assert recipe.parse(one.to_dict()) == one
  assert recipe.parse(yaml.safe_load(yaml.safe_dump(one.to_dict()))) == one


def test_recipes_are_shipped():
  assert recipe.names(RECIPES) == [path.stem for path in FILES]
  assert len(FILES) >= 10


def test_options_are_parsed():
  data = {
    'name': 'x',
    'description': 'y',
    'head': True,
    'steps': [
      {'wanda': {'n': 2, 'm': 4}, 'only': ['layers.0.*', '*.up']},
      {'round_to_nearest': {'format': 'int4', 'group_size': 32, 'symmetric': False}},
      {'magnitude': None},
      {'wanda': {'sparsity': 0}},
    ],
  }
  one = recipe.parse(data)
  assert one.head
  assert one.steps[0].spec == registry.PruneSpec(n=2, m=4)
  assert one.steps[0].only == ('layers.0.*', '*.up')
  assert one.steps[0].matches('layers.0.attention.key')
  assert one.steps[0].matches('layers.1.ffn.up')
  assert not one.steps[0].matches('layers.1.ffn.down')
  assert one.steps[1].spec == techniques.QuantizeSpec(format='int4', group_size=32, symmetric=False)
  assert one.steps[2].spec == registry.PruneSpec()
  assert one.steps[2].row is registry.TECHNIQUES['magnitude']
  assert recipe.parse(one.to_dict()) == one


def _recipe(**changes):
  return {'name': 'x', 'steps': [{'magnitude': {}}], **changes}


def _step(step):
  return _recipe(steps=[{'magnitude': {}}, step])


WRONG = {
  'no mapping': (['magnitude'], 'recipe: a recipe is a mapping, not'),
  'empty file': (None, 'a recipe is a mapping, not None'),
  'unknown key': (_recipe(step=[]), "unknown key 'step'; did you mean steps?"),
  'unknown key, none near': (_recipe(zzz=1), 'there are description, embedding, head'),
  'key of another type': (_recipe(**{}) | {7: 1}, 'unknown key 7'),
  'no name': ({'steps': [{'magnitude': {}}]}, 'needs a name'),
  'empty name': (_recipe(name=''), 'needs a name'),
  'number as a name': (_recipe(name=4), 'needs a name .* not 4'),
  'name that leaves its folder': (_recipe(name='../x'), "needs a name .* not '../x'"),
  'hidden name': (_recipe(name='.x'), 'needs a name'),
  'name of two lines': (_recipe(name='x\n'), 'needs a name'),
  'description': (_recipe(description=['a']), 'description must be a string'),
  'head': (_recipe(head='yes'), "head is true or false, not 'yes'"),
  'head of number': (_recipe(head=1), 'head is true or false, not 1'),
  'no steps': ({'name': 'x'}, 'needs a list of steps'),
  'empty steps': (_recipe(steps=[]), 'needs a list of steps'),
  'steps no list': (_recipe(steps={'magnitude': {}}), 'needs a list of steps'),
  'step no mapping': (_step('magnitude'), "step 2: a step is a mapping, not 'magnitude'"),
  'empty step': (_step({}), 'step 2: a step has one technique'),
  'only alone': (_step({'only': ['*']}), 'step 2: a step has one technique'),
  'two techniques': (_step({'magnitude': {}, 'wanda': {}}), 'a step has one technique .*wanda'),
  'two keys of mixed types': (_step({'magnitude': {}, 3: {}}), 'a step has one technique'),
  'unknown technique': (
    _step({'wnda': {}}),
    "step 2: unknown technique 'wnda'; did you mean wanda",
  ),
  'technique is a number': (_step({3: {}}), "unknown technique '3'"),
  'technique is null': (_step({None: {}}), "unknown technique 'None'"),
  'options no mapping': (_step({'wanda': 0.5}), 'the options of wanda is a mapping, not 0.5'),
  'unknown option': (
    _step({'wanda': {'sparcity': 1}}),
    "wanda: unknown key 'sparcity'; did you mean",
  ),
  'only a string': (_step({'wanda': {}, 'only': '*'}), 'only is a list of layer patterns'),
  'only empty': (_step({'wanda': {}, 'only': []}), 'only is a list of layer patterns'),
  'only of numbers': (_step({'wanda': {}, 'only': [3]}), 'only is a list of layer patterns'),
  'only null': (_step({'wanda': {}, 'only': None}), 'only is a list of layer patterns'),
  'text for a number': (_step({'wanda': {'sparsity': '0.5'}}), "sparsity is float.*, not '0.5'"),
  'truth for a number': (_step({'wanda': {'sparsity': False}}), 'sparsity is float.*, not False'),
  'float for an integer': (_step({'wanda': {'n': 2.0, 'm': 4}}), 'n is int.*, not 2.0'),
  'truth for an integer': (_step({'round_to_nearest': {'group_size': True}}), 'not True'),
  'text for a truth': (_step({'round_to_nearest': {'double': 'no'}}), "double is bool, not 'no'"),
  'number for a truth': (_step({'wanda': {'per_output': 1}}), 'per_output is bool, not 1'),
  'null for a truth': (_step({'wanda': {'per_output': None}}), 'per_output is bool, not None'),
  'list for a name': (_step({'cast': {'dtype': ['x']}}), "dtype is bfloat16 or .*not \\['x'\\]"),
  'unknown dtype': (_step({'cast': {'dtype': 'int8'}}), "dtype is bfloat16 or .*, not 'int8'"),
  'unknown format': (_step({'round_to_nearest': {'format': 'int5'}}), 'int8 or int4 or int3'),
  'value out of range': (_step({'wanda': {'sparsity': 1.5}}), 'step 2, wanda: a sparsity is at'),
  'bad pair': (_step({'wanda': {'n': 3, 'm': 2}}), 'step 2, wanda: N:M sparsity needs'),
  'option that the format lacks': (
    _step({'round_to_nearest': {'format': 'nf4', 'symmetric': False}}),
    'nf4 has no asymmetric form',
  ),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_recipe_is_refused(case):
  data, message = WRONG[case]
  with pytest.raises(ValueError, match=message) as error:
    recipe.parse(data)
  assert str(error.value).startswith('recipe')


@pytest.mark.parametrize(
  'text',
  [
    'name: [',
    'name: x\nname: y\nsteps: [{magnitude: {}}]',
    'name: x\nsteps:\n  - {wanda: {}, wanda: {}}',
    'name: x\nsteps:\n  - wanda: {sparsity: 0.5, sparsity: 0.1}',
    'name: !!python/object/apply:os.system [ls]',
    '\tname: x',
    'name: x\n---\nname: y',
    'name: \udcff',
  ],
)
def test_bad_yaml_is_refused_with_the_name_of_the_file(tmp_path, text):
  path = tmp_path / 'mine.yaml'
  path.write_bytes(text.encode(errors='surrogateescape'))
  with pytest.raises(ValueError, match=r'mine\.yaml is not valid YAML'):
    recipe.load(path)


def test_an_invalid_file_is_named(tmp_path):
  path = tmp_path / 'mine.yaml'
  path.write_text('name: x\nsteps: [{wandda: {}}]')
  with pytest.raises(ValueError, match=r'mine\.yaml, step 1: unknown technique .*wanda'):
    recipe.resolve(str(path), RECIPES)


def test_resolve_finds_files_and_techniques(tmp_path):
  path = tmp_path / 'mine.yml'
  path.write_text('name: mine\nsteps: [{wanda: {}}]')
  assert recipe.resolve(str(path), RECIPES).name == 'mine'
  assert recipe.resolve('wanda', RECIPES).steps[0].spec == registry.PruneSpec()


@pytest.mark.parametrize(
  'name, message',
  [
    ('int9', "unknown recipe 'int9'; did you mean int8"),
    ('wanda5', 'did you mean wanda50'),
    ('', "unknown recipe ''; there are"),
    ('nothing.yaml', 'there is no recipe file nothing.yaml'),
    (str(pathlib.Path(__file__).parent / 'x.yml'), 'there is no recipe file'),
  ],
)
def test_resolve_refuses_unknown_names(name, message):
  with pytest.raises(ValueError, match=message):
    recipe.resolve(name, RECIPES)


def test_the_option_types_of_a_plug_in_are_checked(monkeypatch):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Spec:
    text: str = ''
    number: 'int | float' = 0
    anything: object = None

  monkeypatch.setattr(registry, 'TECHNIQUES', {})
  registry.technique('mine', spec=Spec, paper='')(lambda w, statistics, spec: w)
  parse = lambda **options: recipe.parse({'name': 'x', 'steps': [{'mine': options}]})
  assert parse(text='a', number=0.5, anything=3).steps[0].spec == Spec(
    text='a', number=0.5, anything=3
  )
  with pytest.raises(ValueError, match=r"number is int \| float, not 'a'"):
    parse(number='a')
