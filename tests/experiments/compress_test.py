"""The main job: a smoke run that is killed and resumed, its outputs, and bad input."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from experiments import common, search, study
from model import hf
from model.compress import registry
from model.config import LayerConfig
from model.eval import perplexity, records
from model.eval.records import Metric, Record
from model.infer.generate import generate
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from ops.kernels import cpu

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = ('int8', 'wanda_2of4_int8')
BIASES = ('qkv_bias', 'output_bias', 'mlp_bias')


def _evaluate(model, out, *arguments) -> dict:
  """`experiments.evaluate` as its users call it, in another process."""
  command = [sys.executable, '-m', 'experiments.evaluate', '--json', *arguments]
  text = ['--text', str(out / 'held_out.txt'), '--seq_len=64', f'--model={model}']
  done = subprocess.run([*command, *text], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def finished(script, tmp_path_factory):
  """(out, what was run at first, what was run after) of a smoke run that is killed in between."""
  out, first, after = tmp_path_factory.mktemp('work') / 'out', [], []
  run = study.run

  def killed(work, base, recipe, resume):
    if first:
      raise KeyboardInterrupt
    first.append(recipe.name)
    return run(work, base, recipe, resume)

  def resumed(work, base, recipe, resume):
    after.append(recipe.name)
    return run(work, base, recipe, resume)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(study, 'run', killed)
    with pytest.raises(KeyboardInterrupt):
      script('--smoke', f'--out={out}', '--rounds=5')
    assert not out.exists()
    (partial,) = out.parent.iterdir()
    (partial / 'models' / '.int8.abc.partial').mkdir()  # as a kill while saving leaves it
    patch.setattr(study, 'run', resumed)
    script('--smoke', f'--out={out}', '--rounds=5')
  return out, first, after


def test_a_killed_run_resumes(finished):
  out, first, after = finished
  assert (first, after) == (['int8'], ['wanda_2of4_int8'])
  assert list(out.parent.iterdir()) == [out]


def test_a_budget_is_kept_and_its_recipe_can_be_used_again(finished, script, tmp_path):
  rows = records.read(finished[0] / 'records.jsonl')
  base = next(row for row in rows if row.recipe == 'base').value('stored_bytes')
  limit = 0.3 * base / 1e6
  out, choices = tmp_path / 'budget', '--budget_choices=int8,int4'
  budget = [f'--budget_megabytes={limit}', choices]
  script('--smoke', '--recipes=bf16', f'--out={out}', '--rounds=5', *budget)
  found = {row.recipe: row for row in records.read(out / 'records.jsonl')}
  assert set(found) == {'base', 'bf16', 'budget'}
  assert found['budget'].value('stored_bytes') <= limit * 1e6 < found['bf16'].value('stored_bytes')
  assert all((out / name).stat().st_size > 100 for name in (search.RECIPE, search.PICTURE))
  again = tmp_path / 'again'
  script('--smoke', f'--recipes={out / search.RECIPE}', f'--out={again}', '--rounds=5')
  replayed = next(row for row in records.read(again / 'records.jsonl') if row.recipe == 'budget')
  for metric in ('stored_bytes', 'ppl'):
    assert replayed.value(metric) == found['budget'].value(metric)


def test_a_budget_that_nothing_fits_leaves_nothing(script, tmp_path):
  arguments = ['--smoke', f'--out={tmp_path / "out"}', '--budget_choices=int8,int4']
  with pytest.raises(ValueError, match='at least'):
    script(*arguments, '--budget_megabytes=0.0001')
  with pytest.raises(ValueError, match='above 0'):
    script(*arguments, '--budget_megabytes=-1')
  assert not (tmp_path / 'out').exists()


def test_the_outputs_are_there(finished, script):
  out, *_ = finished
  searched = {search.RECIPE, search.PICTURE}
  assert {path.name for path in out.iterdir()} == script.module.OUTPUTS - searched
  assert {path.name for path in (out / 'models').iterdir()} == set(RECIPES)
  rows = records.read(out / 'records.jsonl')
  assert [row.recipe for row in rows] == ['base', *RECIPES]
  page = (out / 'report.html').read_text()
  assert all(name in page for name in RECIPES)
  assert (out / 'pareto.png').read_bytes().startswith(b'\x89PNG')


def test_the_records_say_what_was_measured(finished):
  rows = {row.recipe: row for row in records.read(finished[0] / 'records.jsonl')}
  base, int8, sparse = (rows[name] for name in ('base', *RECIPES))
  assert base.value('ppl_ratio') == 1.0
  assert int8.value('ppl') == pytest.approx(base.value('ppl'), rel=0.01)
  assert int8.value('kl_to_base') < sparse.value('kl_to_base')
  assert int8.value('linear_bytes_vs_bf16') == pytest.approx(0.5, abs=0.02)
  assert sparse.value('linear_bytes') < int8.value('linear_bytes') < base.value('linear_bytes')
  for row in rows.values():
    assert row.experiment == 'compress'
    assert row.config['calibration_rows'] == 8
    assert row.config['bos'] == 'none'
    assert row.config['prompt_length'] == 128
    assert row.metrics['ppl'].n == row.config['windows'] * 63 == 16 * 63
    assert row.metrics['decode_tokens_per_s'].n == 5
  assert int8.config['recipe']['steps'][-1]['round_to_nearest']['format'] == 'int8'
  if jax.default_backend() == 'cpu':
    assert int8.without_kernel == sparse.without_kernel != cpu.available()


def test_the_committed_records_show_that_native_products_cost_next_to_no_quality():
  rows = records.read(ROOT / 'experiments' / 'results' / 'compress_cpu.jsonl')
  ratios = {
    row.recipe: row.value('native_ppl_ratio') for row in rows if 'native_ppl_ratio' in row.metrics
  }
  assert {'bf16', 'int8', 'int4', 'nf4'} <= set(ratios)
  assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.003)


def test_every_saved_model_evaluates_to_its_record(finished):
  out, *_ = finished
  text = (out / 'held_out.txt').read_bytes().decode()
  for row in records.read(out / 'records.jsonl')[1:]:
    model, tokenizer = hf.load_pretrained(out / 'models' / row.recipe)
    windows = perplexity.windows(*tokenizer.encode_with_bytes(text), 64)
    assert perplexity.evaluate(model, windows).ppl == row.value('ppl')
    new = generate(model, [tokenizer.encode('import os')], max_new_tokens=4)
    assert len(new[0]) <= 4


def test_the_command_that_is_shown_gives_the_record_in_another_process(finished, base):
  out, name = finished[0], RECIPES[-1]
  row = next(r for r in records.read(out / 'records.jsonl') if r.recipe == name)
  result = _evaluate(out / 'models' / name, out, f'--base={base}')
  assert result['ppl'] == row.value('ppl')
  assert result['tokens'] == row.value('tokens')
  assert result['bits_per_byte'] == row.value('bits_per_byte')
  assert result['kl_to_base'] == pytest.approx(row.value('kl_to_base'), abs=1e-7)
  assert result['flip_rate'] == row.value('flip_rate')
  assert result['stored_bytes'] == row.value('stored_bytes')


def test_an_earlier_output_is_replaced_and_nothing_else(finished, script, tmp_path):
  check = script.module._check_out
  check(finished[0])
  check(tmp_path / 'new')
  (tmp_path / 'records.jsonl').touch()
  check(tmp_path)
  (tmp_path / 'run').mkdir()  # such as a folder of train_lm
  with pytest.raises(ValueError, match=r'holds something else \(run\)'):
    check(tmp_path)


@pytest.mark.parametrize('bos_id', [None, 5])
def test_held_out_text_gives_its_windows_again(script, tmp_path, bos_id):
  # Documents of one long word: cut anywhere, it ends in other tokens than within.
  words = [('ab' * n + 'c' * n) for n in range(3, 40)]
  tokenizer = Tokenizer.train_bpe(words * 2, 300)
  module, texts = script.module, ''.join(words[5:])
  tokens_T, ends_T = tokenizer.encode_with_bytes(texts)
  for seq_len in range(2, 9):
    for limit in range(1, len(tokens_T) // seq_len):
      text = module.perplexity.windows(tokens_T, ends_T, seq_len, limit, bos_id)
      corpus = type('Corpus', (), {'held_out': [texts]})
      work = type('Work', (), {'text': text})
      inputs = type('Inputs', (), {'texts': corpus, 'tokenizer': tokenizer})
      module._write_held_out(tmp_path, inputs, work)
      again = tokenizer.encode_with_bytes((tmp_path / 'held_out.txt').read_text())
      found = module.perplexity.windows(*again, seq_len, bos_id=bos_id)
      np.testing.assert_array_equal(found.tokens_BT, text.tokens_BT)
      assert found.predicted_bytes == text.predicted_bytes


def test_the_list_has_every_recipe_and_technique(script, capsys):
  script('--list')
  shown = capsys.readouterr().out
  assert all(path.stem in shown for path in common.RECIPES.glob('*.yaml'))
  for row in registry.TECHNIQUES.values():
    assert row.summary in shown
    assert row.paper in shown


# What goes wrong before any model is loaded: (arguments, message).
EARLY = {
  'unknown recipe': (['--recipes=int9'], "unknown recipe 'int9'; did you mean int8"),
  'unknown technique': (['--recipes=wandaa'], 'did you mean wanda'),
  'no recipe file': (['--recipes=mine.yaml'], 'there is no recipe file mine.yaml'),
  'recipe twice': (['--recipes=int8,int8'], 'names int8 twice'),
  'two budgets': (['--max_megabytes=1', '--max_ppl_ratio=1.1'], 'not both'),
  'no megabytes': (['--max_megabytes=0'], '--max_megabytes must be above 0, not 0'),
  'negative ratio': (['--max_ppl_ratio=-1'], '--max_ppl_ratio must be above 0'),
  'ratio that is no number': (['--max_ppl_ratio=nan'], 'a positive number, not nan'),
  'text alone': (['--text=x.txt'], '--text needs a --model'),
  'no such model': (['--model=no/such/folder/x'], 'no folder'),
  'no such hub model': (['--model=nobody/nothing'], 'could not be fetched'),
  'no plug-in': (['--plugins=none.py'], 'there is no plug-in none.py'),
  'plug-in that is no Python': (['--plugins=README'], 'there is no plug-in README'),
}
FLAGS = (
  ['--seq_len=1'],
  ['--calibration_rows=0'],
  ['--rounds=1'],
  ['--max_windows=-1'],
  ['--max_megabytes=few'],
  ['--seq_length=64'],
)


@pytest.fixture
def refused(script, tmp_path, monkeypatch):
  """A function that runs the script and returns what it says, having done and left nothing."""

  def forbidden(*args, **kwargs):
    raise AssertionError('work was done')

  monkeypatch.setattr(study, 'baseline', forbidden)

  def run(*arguments) -> str:
    out = tmp_path / 'results' / 'out'
    with pytest.raises(ValueError) as error:
      script('--smoke', f'--out={out}', *arguments)
    assert not out.parent.exists()
    return str(error.value)

  return run


@pytest.mark.parametrize('case', EARLY)
def test_bad_input_is_refused_before_a_model_is_loaded(refused, script, monkeypatch, case):
  arguments, message = EARLY[case]
  monkeypatch.setattr(script.module.embedded, 'load_or_train', None)
  found = refused(*arguments)
  assert message in found
  assert '\n' not in found


@pytest.mark.parametrize('arguments', FLAGS, ids=lambda arguments: arguments[0])
def test_bad_flags_are_refused(script, arguments):
  with pytest.raises(flags.Error):
    script('--smoke', *arguments)


CHECKPOINTS = {
  'missing tensor': 'missing: model.layers.1.mlp.up_proj.weight (384, 128)',
  'extra tensor': 'unexpected: extra (3,)',
  'misshapen tensor': 'misshapen: model.layers.1.mlp.up_proj.weight is (384, 127), not (384, 128)',
  'nan': 'NaN or infinity in (1):\n  model.layers.1.mlp.up_proj.weight',
  'infinity': 'NaN or infinity in (1)',
  'truncated': 'model.safetensors',
  'another tokenizer': 'they do not belong together',
  'no tokenizer': 'has no tokenizer',
  'only pickles': 'holds its weights as pickles',
  'no config': 'has no config.json',
  'broken config': 'is no JSON',
}


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(refused, damaged, kind):
  assert CHECKPOINTS[kind] in refused(f'--model={damaged(kind)}')


TEXTS = {
  'too short': ('A text of a few words.\n' * 3, 'too little text|fewer than one window of 64'),
  'short': (''.join(f'Line {i} of a few words.\n' for i in range(30)), 'fewer than one window'),
  'empty': ('', 'empty'),
  'not UTF-8': ('caf\udce9', 'not UTF-8'),
}


@pytest.mark.parametrize('kind', TEXTS)
def test_unusable_text_is_refused(refused, base, tmp_path, kind):
  text, message = TEXTS[kind]
  path = tmp_path / 'text.txt'
  path.write_bytes(text.encode(errors='surrogateescape'))
  found = refused(f'--model={base}', f'--text={path}')
  assert any(part in found for part in message.split('|'))
  assert 'no such file' in refused(f'--model={base}', f'--text={tmp_path / "none"}')


def test_a_recipe_that_does_not_fit_the_model_is_refused(refused, tmp_path):
  path = tmp_path / 'mine.yaml'
  path.write_text('name: mine\nsteps: [{round_to_nearest: {format: int4, group_size: 96}}]')
  found = refused(f'--recipes=int8,{path}')
  assert 'recipe mine: round_to_nearest on layers.0.' in found
  assert 'a group size of 96 does not divide 128 inputs' in found


def test_windows_beyond_learned_positions_are_refused(refused, base, tmp_path):
  tokenizer = Tokenizer.load(base)
  traits = {'gated': False, 'activation': 'gelu_tanh'} | dict.fromkeys(BIASES, True)
  layer = LayerConfig(query_heads=2, kv_heads=2, head_width=16, ffn_width=64, **traits)
  config = hf.load_config(base).replace(
    family='gpt2', width=32, layers=(layer,), rope=None, norm='layer', max_positions=32, tied=True
  )
  hf.save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), tokenizer, tmp_path / 'gpt2')
  found = refused(f'--model={tmp_path / "gpt2"}', '--seq_len=64')
  assert 'windows of 64 tokens are longer than the 32 learned positions' in found


@pytest.mark.parametrize('kind', ['stranger', 'stranger beside records', 'file'])
def test_an_output_that_holds_something_else_is_refused(script, tmp_path, monkeypatch, kind):
  out = tmp_path / 'out'
  if kind == 'file':
    out.write_text('mine')
  else:
    out.mkdir()
    (out / 'thesis.tex').write_text('mine')
    if kind != 'stranger':
      (out / 'records.jsonl').touch()
  monkeypatch.setattr(script.module.embedded, 'load_or_train', None)
  with pytest.raises(ValueError, match=r'holds something else|cannot be replaced'):
    script('--smoke', f'--out={out}')
  kept = out if kind == 'file' else out / 'thesis.tex'
  assert kept.read_text() == 'mine'
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_process_ends_with_one_line_and_status_2(tmp_path):
  command = [sys.executable, '-m', 'experiments.compress', '--recipes=int9', '--smoke']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith("error: unknown recipe 'int9'; did you mean int8")
  assert done.stderr.count('\n') == 1


PLUGIN = '''
from __future__ import annotations
import dataclasses
from model.compress import registry

@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  strength: float | None = None

@registry.technique('mine', spec=Spec, paper='Me 2030, https://example.org')
def mine(w, statistics, spec):
  """Leave every weight as it is."""
  return w
'''


def test_a_plug_in_adds_a_technique(script, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(registry, 'TECHNIQUES', dict(registry.TECHNIQUES))
  path = tmp_path / 'mine.py'
  path.write_text(PLUGIN)
  script('--list', f'--plugins={path}')
  assert 'Leave every weight as it is. Options: strength. Me 2030' in capsys.readouterr().out
  recipe = script.module.recipe
  assert recipe.resolve('mine', common.RECIPES).steps[0].spec.strength is None
  with pytest.raises(ValueError, match='strength is float'):
    recipe.parse({'name': 'x', 'steps': [{'mine': {'strength': 'much'}}]})


def test_what_is_said_where_no_recipe_is_usable(script, capsys, tmp_path):
  metrics = {'ppl': Metric(float('inf'), '1')}
  row = Record(
    experiment='e', recipe='x', command='c', config={'seq_len': 8}, environment={}, seed=0,
    metrics=metrics,
  )  # fmt: skip
  choice = script.module.select.choose([row], script.module.select.Budget(max_megabytes=1))
  script.module._say([row], choice, tmp_path)
  assert 'nothing to choose' in capsys.readouterr().out
