"""distill: students that load and measure as their records say, resumed runs, wrong flags."""

import json

import numpy as np
import pytest

from model import hf
from model.compress import pipeline, recipe
from model.eval import records
from model.tokenizer import Tokenizer
from model.train.targets import StoredTargets
from model.transformer import parameters


def _weights(folder):
  model, _ = hf.load_pretrained(folder)
  return {path: np.asarray(param.get_value()) for path, param in parameters(model).items()}


def test_a_student_of_the_teachers_layers_is_saved_measured_and_resumed(script, tmp_path, capsys):
  out = tmp_path / 'out'
  flags = [
    '--smoke',
    f'--out={out}',
    '--hidden=cosine',
    '--hard_weight=0.5',
    '--checkpoint_every=2',
  ]
  script(*flags)
  (record,) = records.read(out / 'records.jsonl')
  model, tokenizer = hf.load_pretrained(out / 'model')
  assert len(model.config.layers) == 1 and tokenizer is not None
  assert record.value('parameters') < record.value('teacher_parameters')
  losses = [record.value(f'held_out_loss_{name}') for name in ('teacher', 'student', 'before')]
  assert losses == sorted(losses) and losses[2] < 8
  updates = [json.loads(line) for line in (out / 'run' / 'loss.jsonl').read_text().splitlines()]
  assert len(updates) == 6 and {'soft', 'hard', 'hidden_cosine'} <= updates[0].keys()
  assert record.value('train_soft') == updates[-1]['soft'] < updates[0]['soft']
  assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG')
  assert f'perplexity {np.exp(losses[1]):.3f}' in capsys.readouterr().out
  before = _weights(out / 'model')
  script(*flags)  # nothing is left to do
  after = _weights(out / 'model')
  assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.slow
def test_a_pruned_teacher_is_healed_and_measured_along_the_way(script, base, tmp_path):
  teacher, tokenizer = hf.load_pretrained(base)
  step = {'prune_ffn': {'ratio': 0.5, 'importance': 'weights'}}
  pruned, _ = pipeline.compress(teacher, recipe.parse({'name': 'pruned', 'steps': [step]}))
  hf.save_pretrained(pruned, tokenizer, tmp_path / 'pruned')
  out = tmp_path / 'out'
  script('--smoke', f'--student={tmp_path / "pruned"}', f'--out={out}', '--evaluate_every=2')
  (record,) = records.read(out / 'records.jsonl')
  teacher, before, student = (
    record.value(f'held_out_loss_{name}') for name in ('teacher', 'before', 'student')
  )
  assert record.value('recovered') == pytest.approx((before - student) / (before - teacher))
  assert record.value('held_out_loss_after_6') == student
  assert record.value('held_out_loss_after_2') not in (before, student)
  assert 'held_out_loss_after_3' not in record.metrics
  assert record.value('parameters') < 0.8 * record.value('teacher_parameters')


@pytest.mark.slow
def test_stored_targets_serve_a_random_student(script, tmp_path):
  flags = ['--smoke', '--student=random', '--layers=0,1', '--head=4', '--draws=4']
  script(*flags, f'--out={tmp_path / "a"}', f'--targets={tmp_path / "targets"}')
  (record,) = records.read(tmp_path / 'a' / 'records.jsonl')
  found = StoredTargets(tmp_path / 'targets')
  assert record.config['target_bytes_per_token'] == found.bytes_per_token
  assert record.value('parameters') == record.value('teacher_parameters')
  assert (found.config.head, found.config.draws, found.config.vocabulary) == (4, 4, 512)


@pytest.mark.slow
def test_a_student_that_is_a_folder_writes_its_own_batches(script, base, tmp_path):
  out = tmp_path / 'out'
  script('--smoke', f'--student={base}', f'--out={out}', '--on_policy=1', '--prompt_length=60')
  updates = [json.loads(line) for line in (out / 'run' / 'loss.jsonl').read_text().splitlines()]
  assert all(record['tokens'] <= 4 * 5 for record in updates)  # 4 rows of 64 tokens and a label
  assert updates[0]['soft'] == pytest.approx(0, abs=1e-5)  # it is the teacher itself


@pytest.mark.parametrize(
  'arguments, match',
  [
    (['--layers=x'], 'is no number and no list'),
    (['--layers=3'], 'between 1 and all 2 layers'),
    (['--divergence=jsd'], 'mix of jsd must be'),
    (['--soft_weight=0'], 'nothing to learn'),
    (['--learning_rate=0'], '--learning_rate must be above 0'),
    (['--targets=t', '--hidden=mse'], '--targets holds distributions over given texts'),
    (['--on_policy=0.5', '--hard_weight=1'], 'no labels for it'),
  ],
)
def test_bad_input_is_refused_before_training(script, tmp_path, monkeypatch, arguments, match):
  monkeypatch.setattr(script.module.loop.step_lib, 'init', None)
  with pytest.raises(ValueError, match=match):
    script('--smoke', f'--out={tmp_path / "out"}', *arguments)
  assert not (tmp_path / 'out').exists()


def test_a_teacher_of_another_tokenizer_is_refused(script, base, tmp_path, monkeypatch):
  monkeypatch.setattr(script.module.loop, 'fit', None)
  model, _ = hf.load_pretrained(base)
  other = Tokenizer.train_bpe(['other words than those of the library'], 400)
  hf.save_pretrained(model, other, tmp_path / 'student')
  with pytest.raises(ValueError, match='a teacher of another tokenizer'):
    script('--smoke', f'--student={tmp_path / "student"}', f'--out={tmp_path / "out"}')
