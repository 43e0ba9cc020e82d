"""The main job: a smoke run that is killed and resumed, its outputs, and bad input."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import common, comparison, search, study
from model import hf, manifest
from model.compress import registry
from model.eval import library_tasks, perplexity, records
from model.infer.generate import generate
from model.infer.prepare import prepare
from model.tokenizer import Tokenizer
from ops.kernels import cpu

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = ('int8', 'wanda_2of4_int8')
TASKS = '--tasks=python_lines'


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
      script('--smoke', f'--out={out}', '--rounds=5', TASKS)
    assert not out.exists()
    (partial,) = out.parent.iterdir()
    (partial / 'models' / '.int8.abc.partial').mkdir()  # as a kill while saving leaves it
    (partial / 'models' / '.int8.lock').touch()
    patch.setattr(study, 'run', resumed)
    script('--smoke', f'--out={out}', '--rounds=5', TASKS)
  return out, first, after


def test_a_killed_run_resumes(finished):
  out, first, after = finished
  assert (first, after) == (['int8'], ['wanda_2of4_int8'])
  assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
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
  (tmp_path / 'real').mkdir()
  again = tmp_path / 'again'
  again.symlink_to('real')
  script('--smoke', f'--recipes={out / search.RECIPE}', f'--out={again}', '--rounds=5')
  replayed = next(row for row in records.read(again / 'records.jsonl') if row.recipe == 'budget')
  for metric in ('stored_bytes', 'ppl'):
    assert replayed.value(metric) == found['budget'].value(metric)
  assert again.is_symlink() and {path.name for path in tmp_path.iterdir()} == {
    'again', 'budget', 'real'
  }  # fmt: skip
  manifest.check_replaceable(again, kind=comparison.KIND)


def test_a_budget_that_nothing_fits_leaves_nothing(script, tmp_path):
  arguments = ['--smoke', f'--out={tmp_path / "out"}', '--budget_choices=int8,int4']
  with pytest.raises(ValueError, match='at least'):
    script(*arguments, '--budget_megabytes=0.0001')
  with pytest.raises(ValueError, match='above 0'):
    script(*arguments, '--budget_megabytes=-1')
  assert not (tmp_path / 'out').exists()


def test_the_outputs_are_there(finished):
  out, *_ = finished
  names = {'models', 'records.jsonl', 'held_out.txt', 'report.html', 'pareto.png', 'layers.png'}
  assert {path.name for path in out.iterdir()} == {*names, manifest.NAME}
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
  assert base.value('ppl_ratio_se') == 0 < int8.value('ppl_ratio_se') < sparse.value('ppl_ratio_se')
  assert int8.value('linear_bytes_vs_bf16') == pytest.approx(0.5, abs=0.02)
  assert sparse.value('linear_bytes') < int8.value('linear_bytes') < base.value('linear_bytes')
  for row in rows.values():
    assert row.experiment == 'compress'
    assert row.config['calibration_rows'] == 8
    assert row.config['bos'] == 'none'
    assert row.config['prompt_length'] == 128
    assert row.metrics['ppl'].n == row.config['texts']['python-source']['windows'] * 63 == 16 * 63
    assert row.metrics['decode_tokens_per_s'].n == 5
    assert row.metrics['ppl_se'].n == 16 and row.value('ppl_se') > 0
    assert ('energy_j_per_token' in row.metrics) != row.config['energy'].startswith('not ')
  assert int8.config['recipe']['steps'][-1]['round_to_nearest']['format'] == 'int8'
  if jax.default_backend() == 'cpu':
    expected = 0 if cpu.available() else 14  # two layers of seven matrices
    assert (base.without_kernel, int8.without_kernel, sparse.without_kernel) == (0, *[expected] * 2)
    widened = [name for name, row in rows.items() if 'widened_ppl_ratio' in row.metrics]
    assert widened == (list(RECIPES) if cpu.available() else [])
    for name in widened:
      # Measured on 1008 tokens of a model of two layers.
      ratio = rows[name].value('widened_ppl_ratio') / rows[name].value('ppl_ratio')
      assert ratio != 1.0 and ratio == pytest.approx(1.0, abs=0.003)
      assert rows[name].value('ppl_vs_widened') == pytest.approx(1 / ratio)
      assert 0 < rows[name].value('ppl_vs_widened_se') < 0.003
      assert rows[name].metrics['ppl_vs_widened_se'].n == 16


def test_accuracies_stand_beside_perplexities(finished):
  rows = records.read(finished[0] / 'records.jsonl')
  task = library_tasks.load('python_lines', 16)
  base = rows[0].value('accuracy:python_lines')
  for row in rows:
    assert row.config['tasks']['python_lines'] == {
      'fingerprint': task.fingerprint,
      'documents': 16,
      'chance': 0.25,
    }
    accuracy, error = row.metrics['accuracy:python_lines'], row.value('accuracy_se:python_lines')
    assert accuracy.n == 16 and 0 < accuracy.value < 1
    assert error == pytest.approx((accuracy.value * (1 - accuracy.value) / 15) ** 0.5)
    if row.recipe != 'base':
      assert row.value('accuracy_change:python_lines') == pytest.approx(accuracy.value - base)
    assert f'{100 * accuracy.value:.1f}±{100 * error:.1f}' in (
      finished[0] / 'report.html'
    ).read_text('utf-8')


def test_the_committed_records_show_that_native_products_cost_next_to_no_quality():
  rows = records.read(ROOT / 'experiments' / 'results' / 'compress_cpu.jsonl')
  ratios = {
    row.recipe: row.value('ppl_ratio') / row.value('widened_ppl_ratio')
    for row in rows
    if 'widened_ppl_ratio' in row.metrics
  }
  assert {'bf16', 'int8', 'int4', 'nf4'} <= set(ratios)
  assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=0.001)


def test_every_saved_model_evaluates_to_its_record(finished):
  out, *_ = finished
  text = (out / 'held_out.txt').read_bytes().decode()
  for row in records.read(out / 'records.jsonl')[1:]:
    model, tokenizer = hf.load_pretrained(out / 'models' / row.recipe)
    windows = perplexity.windows(*tokenizer.encode_with_bytes(text), 64)
    assert perplexity.evaluate(prepare(model), windows).ppl == row.value('ppl')
    new = generate(model, [tokenizer.encode('import os')], max_new_tokens=4)
    assert len(new[0]) <= 4


@pytest.mark.slow
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


def test_an_output_may_be_replaced_by_another_run(finished):
  manifest.check_replaceable(finished[0], kind=comparison.KIND)
  for name in RECIPES:
    manifest.check_replaceable(finished[0] / 'models' / name)


def test_the_list_has_every_recipe_and_technique(script, capsys):
  script('--list')
  shown = capsys.readouterr().out
  assert all(path.stem in shown for path in common.RECIPES.glob('*.yaml'))
  for row in registry.TECHNIQUES.values():
    assert row.summary in shown
    assert row.paper in shown


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


@pytest.mark.slow
def test_several_texts_are_calibrated_on_together_and_measured_one_by_one(script, base, tmp_path):
  tokenizer, texts, out = Tokenizer.load(base), {}, tmp_path / 'out'
  for name, words in (('verse', 'roses are red, violets blue'), ('sums', '1 + 1 = 2; 3 - 2 = 1')):
    lines = [f'{i} {words} {i * i}\n' for i in range(3000)]
    texts[name] = tmp_path / f'{name}.txt'
    texts[name].write_text(''.join(lines))
  arguments = ['--recipes=wanda50', '--calibration_rows=9', '--max_windows=4', '--rounds=5']
  both = f'--text={texts["verse"]},{texts["sums"]}'
  script(f'--model={base}', both, '--seq_len=64', f'--out={out}', *arguments)
  first, pruned = records.read(out / 'records.jsonl')
  assert list(pruned.config['texts']) == ['verse', 'sums']
  assert pruned.config['calibration_rows'] == 9
  model = hf.load_pretrained(out / 'models' / 'wanda50')[0]
  for file, suffix in (('held_out.txt', ''), ('held_out_sums.txt', ':sums')):
    text = (out / file).read_bytes().decode()
    windows = perplexity.windows(*tokenizer.encode_with_bytes(text), 64)
    ppl = perplexity.evaluate(prepare(model), windows).ppl
    assert ppl == pruned.value(f'ppl{suffix}') != first.value(f'ppl{suffix}')
    ratio = pruned.value(f'ppl{suffix}') / first.value(f'ppl{suffix}')
    assert pruned.value(f'ppl_ratio{suffix}') == pytest.approx(ratio, rel=1e-12)
  assert pruned.value('ppl') != pruned.value('ppl:sums')


def test_texts_of_one_name_are_refused(script, base, tmp_path):
  same = tmp_path / 'a' / 'x.txt', tmp_path / 'b' / 'x.md'
  with pytest.raises(ValueError, match='--text names x twice'):
    script(f'--model={base}', f'--text={same[0]},{same[1]}', f'--out={tmp_path / "out"}')
