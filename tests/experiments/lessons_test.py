"""Recipes whose steps train: what they leave, and that a killed one ends with the same bits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from experiments import base as embedded
from experiments import lessons
from model import hf, native
from model.compress import pipeline, progress, recipe
from model.train.data import PackedDataset
from model.transformer import Transformer, matrices
from ops import quantized, sparse
from ops.linear import dense

TINY = {'steps': 4, 'batch_size': 2, 'checkpoint_every': 2, 'warmup_steps': 1}
STEPS = [
  {'prune_ffn': {'ratio': 0.25, 'importance': 'weights', 'multiple': 8}},
  {'distill': {**TINY, 'learning_rate': 1e-3}},
  {'qat': {**TINY, 'format': 'int4', 'group_size': 16, 'teacher': True}},
  {'cast': {'dtype': 'bfloat16'}},
]


def _recipe(*steps):
  return recipe.parse({'name': 'x', 'steps': list(steps)})


WHOLE = _recipe(*STEPS[:3])


@pytest.fixture(scope='module')
def school(cache):
  trained = embedded.load_or_train(cache, smoke=True)
  return lessons.School(
    original=trained.model,
    tokenizer=trained.tokenizer,
    texts=trained.texts.train[:40],
    seq_len=32,
  )


def _run(school, one, folder=None):
  rows_BT = np.asarray(school.rows(lessons.LessonSpec()).batch(0).tokens_BT)
  model, ledger = pipeline.compress(school.original, one, rows_BT, resume=folder, school=school)
  arrays, layout = native.flatten(model)
  return model, layout, {name: np.asarray(a).tobytes() for name, a in arrays.items()}, ledger


@pytest.fixture(scope='module')
def small(school):
  """A school of a model of one layer, which is compiled sooner."""
  config = school.original.config
  original = Transformer(config.replace(layers=config.layers[:1]), rngs=nnx.Rngs(0))
  return dataclasses.replace(school, original=original)


@pytest.fixture(scope='module')
def whole(small):
  return _run(small, WHOLE)


def test_the_ledger_says_what_training_took(whole):
  model, _, _, ledger = whole
  found = {(row.technique, row.event): int(row.detail) for row in ledger.events}
  for name in ('distill', 'qat'):
    assert found[name, 'updates'] == 4
    assert 100 < found[name, 'tokens learned from'] <= 4 * 2 * 32
  for layer, w in matrices(model).items():
    if layer.startswith('layers.'):
      assert isinstance(w, quantized.QuantizedTensor) and w.format == 'int4'
  assert model.config.layers[0].ffn.width < 384


class Killed(Exception):
  """Stands for a kill."""


def _dying(monkeypatch, after):
  """Has the run die when it asks for a batch for the so-manieth time."""
  asked, batch = [], PackedDataset.batch

  def dying(self, step):
    asked.append(step)
    if len(asked) > after:
      raise Killed
    return batch(self, step)

  monkeypatch.setattr(PackedDataset, 'batch', dying)


@pytest.mark.slow
def test_killed_in_both_lessons_it_ends_with_the_same_bits(small, whole, tmp_path):
  folder = tmp_path / 'progress'
  for after, left in ((3, 'lesson_1'), (2 + 3, 'lesson_2')):  # two updates are taken over
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
      _dying(patch, after)
      _run(small, WHOLE, folder)
    assert (folder / left / 'checkpoints').is_dir()
  model, layout, arrays, _ = _run(small, WHOLE, folder)
  assert layout == whole[1] and arrays == whole[2]
  assert not folder.exists()
  hf.save_pretrained(model, small.tokenizer, tmp_path / 'model')
  again, _ = hf.load_pretrained(tmp_path / 'model')
  tokens = jax.numpy.arange(24).reshape(2, 12)
  np.testing.assert_array_equal(again(tokens), model(tokens))


LATE = _recipe(
  {'magnitude': {'n': 2, 'm': 4}, 'only': ['*.ffn.*']},
  {'magnitude': {'sparsity': 0.3}, 'only': ['*.attention.*']},
  {'finetune': {**TINY, 'learning_rate': 1e-3}},
  {'round_to_nearest': {'format': 'int4', 'group_size': 16}},
  {'lora': {**TINY, 'rank': 2, 'learning_rate': 1e-2}},
)


@pytest.fixture(scope='module')
def late(small, tmp_path_factory):
  """A run of `LATE` that is killed in its last step, and the model before that step."""
  folder = tmp_path_factory.mktemp('late') / 'progress'
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    _dying(patch, 4 + 3)
    _run(small, LATE, folder)
  assert (folder / 'lesson_4' / 'checkpoints').is_dir()
  rounded, _ = progress.Progress(folder).restore_model(jax.numpy.float32)
  return *_run(small, LATE, folder), _dense(rounded)


def _pruned(school):
  return pipeline.compress(school.original, dataclasses.replace(LATE, steps=LATE.steps[:2]))[0]


def _dense(model):
  return {layer: np.asarray(dense(w)) for layer, w in matrices(model).items()}


@pytest.mark.slow
def test_killed_in_a_lesson_of_the_last_phase_it_ends_with_the_same_bits(small, late):
  _, layout, arrays, _ = _run(small, LATE)
  assert layout == late[1] and arrays == late[2]


@pytest.mark.slow
def test_pruned_weights_stay_zero_in_training_and_the_others_learn(small, late):
  model, *_, ledger, rounded = late
  pruned, final, kinds = _dense(_pruned(small)), _dense(model), matrices(model)
  for layer in (layer for layer in final if layer.startswith('layers.')):
    kept = pruned[layer] != 0
    assert kept.mean() == pytest.approx(0.5 if '.ffn.' in layer else 0.7, abs=0.01)
    for after in (rounded, final):
      assert not after[layer][~kept].any()
      assert (after[layer] != pruned[layer])[kept].mean() > 0.9
    assert (final[layer] != rounded[layer]).mean() > 0.1
    inner = getattr(kinds[layer], 'values', None) if '.ffn.' in layer else kinds[layer]
    assert isinstance(inner, quantized.QuantizedTensor) and inner.format == 'int4'
    assert isinstance(kinds[layer], sparse.SparseTensor) == ('.ffn.' in layer)
  found = {(row.technique, row.event): int(row.detail) for row in ledger.events}
  assert found['lora', 'updates'] == 4 and found['lora', 'tokens learned from'] > 100
  assert sum('merging' in event or 'after it' in event for _, event in found) == 2


def test_another_school_does_not_resume(small, tmp_path):
  folder = tmp_path / 'progress'
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    _dying(patch, 3)
    _run(small, WHOLE, folder)
  other = dataclasses.replace(small, texts=small.texts[1:])
  with pytest.raises(ValueError, match='does not hold the progress of this recipe'):
    _run(other, WHOLE, folder)


@pytest.mark.slow
def test_learning_brings_a_pruned_model_nearer_to_the_original(school):
  healing = {'steps': 12, 'batch_size': 4, 'learning_rate': 2e-3, 'warmup_steps': 1}
  narrow = {'prune_width': {'ratio': 0.5, 'importance': 'weights'}}
  pruned, *_ = _run(school, _recipe(narrow))
  healed, *_ = _run(school, _recipe(narrow, {'distill': healing}))
  tokens = school.rows(lessons.LessonSpec(batch_size=8, steps=2)).batch(1).tokens_BT
  logits = lambda model: jax.nn.log_softmax(model(tokens))
  want = logits(school.original)
  distance = lambda model: float((np.exp(want) * (want - logits(model))).sum(-1).mean())
  assert distance(healed) < distance(pruned)


@pytest.mark.parametrize(
  'steps, message',
  [
    ([{'round_to_nearest': {}}, {'distill': TINY}], 'distill: layers.0.*codes, .* by lora'),
    ([{'qat': TINY}, {'finetune': TINY}], 'finetune: layers.0.*codes, .* train before the step'),
    ([{'lora': {'targets': ['*.upp']}}], r"lora: no layer matches '\*\.upp'"),
    ([{'lora': {'rank': 129}}], 'lora: layers.0.*: a rank lies between 1 and'),
    ([{'lora': {'merge': False}}, {'lora': {}}], 'has an adapter already; merge it first'),
    ([{'lora': {'merge': False}}, {'wanda': {}}], 'needs calibration text'),
    ([{'qat': {**TINY, 'group_size': 48}}], 'a group size of 48 does not divide'),
    ([{'qat': TINY}, {'wanda': {'sparsity': 0.5}}], 'needs calibration text'),
    ([{'qat': TINY}, {'round_to_nearest': {}}], 'already quantized'),
  ],
)
def test_what_does_not_fit_is_refused_before_any_work(school, steps, message):
  with pytest.raises(ValueError, match=message):
    pipeline.check(school.original, _recipe(*steps), learns=True)
  with pytest.raises(ValueError, match='trains, and has no text for it'):
    pipeline.check(school.original, _recipe({'distill': TINY}))


def test_settings_are_checked_when_a_recipe_is_read():
  with pytest.raises(ValueError, match='steps must be at least 1, not 0'):
    _recipe({'distill': {'steps': 0}})
  with pytest.raises(ValueError, match="'int5'"):
    _recipe({'qat': {'format': 'int5'}})
  with pytest.raises(ValueError, match="unknown key 'ranks'; did you mean rank"):
    _recipe({'lora': {'ranks': 8}})
  with pytest.raises(ValueError, match="targets is a list of str, not 'layers"):
    _recipe({'lora': {'targets': 'layers.*'}})
  with pytest.raises(ValueError, match='a rank is a whole number of at least 1, not 0'):
    _recipe({'lora': {'rank': 0}})


def test_the_targets_of_adapters_survive_a_file():
  one = _recipe({'lora': {'targets': ['*.up', '*.down']}})
  assert recipe.parse(json.loads(json.dumps(one.to_dict()))) == one
  assert recipe.parse(yaml.safe_load(yaml.safe_dump(one.to_dict()))) == one


@pytest.mark.slow
def test_windows_are_healed_by_distillation(small):
  """The model learns to predict with its window what the original predicts without one."""
  window = {'sparse_attention': {'pattern': 'window4+first2', 'full_every': None}}
  lesson = {'distill': {**TINY, 'steps': 40, 'learning_rate': 1e-4}}
  rows_BT = np.asarray(small.rows(lessons.DistillSpec(**lesson['distill'])).batch(0).tokens_BT)
  expected = _log_softmax(small.original, rows_BT)
  divergence = {}
  for name, steps in {'before': (window,), 'after': (window, lesson)}.items():
    model, ledger = pipeline.compress(small.original, _recipe(*steps), rows_BT, school=small)
    assert [str(layer.mixer.pattern) for layer in model.config.layers] == ['window4+first2']
    found = _log_softmax(model, rows_BT)
    divergence[name] = (np.exp(expected) * (expected - found)).sum(-1).mean()
  assert 0 < divergence['after'] < 0.9 * divergence['before']
  assert [row.technique for row in ledger.events] == ['sparse_attention'] + ['distill'] * 3


def _log_softmax(model, rows_BT):
  return np.asarray(jax.nn.log_softmax(model(rows_BT)), np.float64)
