"""Batches that the student writes: their layout by hand, their source, and whole runs."""

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.infer.generate import generate
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import data, loop
from model.train.data import PackedDataset
from model.train.distill import Distillation
from model.train.features import Hidden
from model.train.loop import FitConfig
from model.train.objectives import CrossEntropy
from model.train.on_policy import OnPolicy
from model.train.optimizer import OptimizerConfig
from model.train.step import Task
from model.transformer import Transformer, linears
from ops.sampling import SamplingConfig

EOS, V, SEQ_LEN = 9, 20, 8


def _model(seed, layers=1):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=16)
  )
  config = ModelConfig(
    family='llama',
    vocab_size=V,
    width=16,
    layers=(layer,) * layers,
    max_positions=64,
    eos_ids=(EOS,),
  )
  model = Transformer(config, rngs=nnx.Rngs(seed))
  for linear in linears(model).values():
    linear.weight.set_value(8 * linear.weight.get_value())
  return model


def _writer(temperature):
  def write(model, prompts, new_tokens, seeds):
    config = SamplingConfig(temperature=temperature)
    texts = generate(
      model, prompts, max_new_tokens=new_tokens, sampling_config=config, seed=list(seeds)
    )
    return [text if len(text) == new_tokens else [*text, EOS] for text in texts]

  return write


def _on_policy(write=None, **settings):
  settings = {'prompt_length': 4, 'new_tokens': 5, 'fraction': 1.0, **settings}
  return OnPolicy(write=write or _writer(1.0), settings={'temperature': 1.0}, **settings)


def _dataset(batch_size=3):
  documents = [[1, 2, 3, 4, 5, 6, 7], [8, 10, 11], [12, 13], [14, 15, 16, 17, 18]]
  return PackedDataset.from_ids(documents, eos_id=EOS, seq_len=SEQ_LEN, batch_size=batch_size)


def test_a_written_batch_matches_one_by_hand():
  # Rows: 1 2 3 4 | 5 6 7 9,  8 10 11 9 | 12 13 9 14,  15 16 17 18 | 9 and padding.
  batch = next(iter(_dataset().sequential()))
  asked = []

  def write(model, prompts, new_tokens, seeds):
    asked.append((prompts, new_tokens, len(set(seeds))))
    return [[1, 2, 3, 4, 5], [7, EOS], [6]]

  got = _on_policy(write)(batch, 0, _model(0))
  # The second document ends within the first four tokens, and its end is no prompt.
  assert asked == [([[1, 2, 3, 4], [8, 10, 11], [15, 16, 17, 18]], 5, 3)]
  want = {
    'tokens_BT': [[1, 2, 3, 4, 1, 2, 3, 4], [8, 10, 11, 7] + 4 * [0], [15, 16, 17, 18] + 4 * [0]],
    'labels_BT': [
      [-1, -1, -1, 1, 2, 3, 4, 5],
      [-1, -1, 7, EOS, -1, -1, -1, -1],
      [-1, -1, -1, 6, -1, -1, -1, -1],
    ],
    'segments_BT': [[1] * 8, [1] * 4 + [0] * 4, [1] * 4 + [0] * 4],
    'positions_BT': [list(range(8)), [0, 1, 2, 3] * 2, [0, 1, 2, 3] * 2],
  }
  for name, rows in want.items():
    np.testing.assert_array_equal(getattr(got, name), rows, name)
    assert getattr(got, name).dtype == np.int32


def test_a_chat_is_a_prompt_up_to_the_assistants_words():
  chats = [data.Document(np.arange(1, 8), np.arange(1, 8) > 4)]  # 5 6 7 are the assistant's
  batch = next(iter(PackedDataset.from_whole(chats, seq_len=SEQ_LEN, batch_size=1).sequential()))
  asked = []

  def write(model, prompts, new_tokens, seeds):
    asked.extend(prompts)
    return [[6]]

  got = _on_policy(write, prompt_length=6, new_tokens=2)(batch, 0, _model(0))
  assert asked == [[1, 2, 3, 4]]
  np.testing.assert_array_equal(got.labels_BT, [[-1, -1, -1, 6, -1, -1, -1, -1]])


def test_the_labels_are_what_the_student_says_and_follow_seed_and_step(rng):
  student, batch = _model(3), _dataset().batch(0)
  greedy = _on_policy(_writer(0.0))(batch, 0, student)
  context = {'positions_BT': greedy.positions_BT, 'segments_BT': greedy.segments_BT}
  graphdef, state = nnx.split(student)
  run = jax.jit(lambda state, *tokens, **own: nnx.merge(graphdef, state)(*tokens, **own))
  logits = run(state, greedy.tokens_BT, **context)
  written = greedy.labels_BT >= 0
  assert written.sum() >= 9
  np.testing.assert_array_equal(np.argmax(logits, -1)[written], greedy.labels_BT[written])
  labels = lambda step, **settings: _on_policy(**settings)(batch, step, student).labels_BT
  np.testing.assert_array_equal(labels(0), labels(0))
  assert np.any(labels(0) != labels(1)) and np.any(labels(0) != labels(0, seed=1))


def test_a_fraction_of_the_batches_is_written():
  batch = _dataset().batch(0)
  write = lambda model, prompts, new_tokens, seeds: [[1]] * len(prompts)

  def written(fraction, seed=0):
    policy = _on_policy(write, fraction=fraction, seed=seed)
    model = _model(0)
    return [policy(batch, step, model) is not batch for step in range(400)]

  assert abs(np.mean(written(0.25)) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
  assert written(0.25) == written(0.25) != written(0.25, seed=1)
  assert not any(written(0.0)) and all(written(1.0))


def test_a_run_writes_learns_and_resumes_bitwise(tmp_path):
  dataset, teacher = _dataset(), _model(7)
  config = FitConfig(optimizer=OptimizerConfig(steps=10, learning_rate=1e-2), checkpoint_every=3)
  calls = []

  def writing(dies_at=None):
    def write(*arguments):
      calls.append(arguments[2])
      if len(calls) == dies_at:
        raise KeyboardInterrupt
      return _writer(1.0)(*arguments)

    return write

  def fit(folder, write, **settings):
    task = Task(
      objective=Distillation(features=(Hidden(),)),
      references={'teacher': teacher},
      on_policy=_on_policy(write, fraction=0.7, **settings),
    )
    return loop.fit(_model(3), dataset, config, task=task, folder=tmp_path / folder, progress=False)

  whole = fit('whole', writing())
  assert 4 <= len(calls) < 10
  assert whole.records[-1]['soft'] < whole.records[0]['soft']
  calls.clear()
  with pytest.raises(KeyboardInterrupt):
    fit('killed', writing(dies_at=4))
  resumed = fit('killed', writing())
  leaves = lambda result: jax.tree.leaves(nnx.split(result.model)[1])
  assert all(np.array_equal(a, b) for a, b in zip(leaves(whole), leaves(resumed), strict=True))
  assert whole.records == resumed.records
  with pytest.raises(ValueError, match=r'differs in on_policy\.new_tokens \(5 there, 4 here\)'):
    fit('killed', writing(), new_tokens=4)


@pytest.mark.parametrize(
  'objective, settings, match',
  [
    (CrossEntropy(), {}, 'CrossEntropy has no teacher'),
    (Distillation(hard_weight=0.5), {}, r'hard_weight is 0\.5, but the tokens that a student'),
    (Distillation(), {'new_tokens': 6}, 'prompts of 4 and 6 new tokens do not fit into rows of 8'),
  ],
)
def test_what_does_not_suit_is_refused_before_any_work(objective, settings, match):
  task = Task(
    objective=objective,
    references={'teacher': _model(1)},
    on_policy=_on_policy(lambda *_: pytest.fail('it has written'), **settings),
  )
  config = FitConfig(optimizer=OptimizerConfig(steps=1, learning_rate=1e-2))
  with pytest.raises(ValueError, match=match):
    loop.fit(_model(0), _dataset(), config, task=task, progress=False)


def test_bad_settings_and_bad_writers_are_named():
  with pytest.raises(ValueError, match=r'within 0 and 1, not 1\.5'):
    _on_policy(fraction=1.5)
  with pytest.raises(ValueError, match='at least 1, not 0 and 5'):
    _on_policy(prompt_length=0)
  batch = _dataset().batch(0)
  with pytest.raises(ValueError, match='3 prompts were to be continued, but 1 texts came back'):
    _on_policy(lambda *_: [[1]])(batch, 0, _model(0))
  with pytest.raises(ValueError, match=r'at most 5 tokens of 20, not \[20\]'):
    _on_policy(lambda *_: [[20]] * 3)(batch, 0, _model(0))
