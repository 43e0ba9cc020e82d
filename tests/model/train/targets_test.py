"""Stored targets: the mean of their gradients, their files, and what they refuse."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.tokenizer import Tokenizer
from model.train import loop, stored, targets
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.distill import Distillation
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.step import StepConfig, Task
from model.train.stored import StoredDistillation, TargetDataset
from model.train.targets import StoredTargets, TargetConfig
from model.transformer import Transformer, linears
from ops.divergences import Divergence

V, SEQ_LEN = 260, 10
DRAWN = 20_000  # targets of one distribution, for means
STANDARD_ERRORS = 4
CONFIG = TargetConfig(head=5, draws=6, temperature=2.0, rows_per_shard=4, batch_size=2, chunk=8)


# --- One distribution -----------------------------------------------------------------------------


def _distributions(rng, tokens=30):
  return (2 * rng.standard_normal((2, tokens))).astype(np.float32)


def _drawn(rng, teacher, head, draws, temperature=1.0):
  uniform = jnp.asarray(rng.random((DRAWN, draws)), jnp.float32)
  logits = jnp.broadcast_to(jnp.asarray(teacher), (DRAWN, len(teacher)))
  return jax.jit(targets.of_logits, static_argnums=2)(logits, uniform, head, temperature)


def _gradients(student, found):
  """The gradient of each target's loss by the student's logits, [DRAWN, V]."""
  logits = jnp.broadcast_to(jnp.asarray(student), (DRAWN, len(student)))
  names = ('ids', 'log_probs', 'entropy')
  loss = lambda z: jnp.sum(stored.divergence(z, *(found[name] for name in names)))
  return np.float64(jax.jit(jax.grad(loss))(logits))


@pytest.mark.parametrize('head, draws', [(4, 3), (0, 8), (29, 1)])
def test_gradients_and_losses_are_unbiased(rng, head, draws):
  """D4: the mean over 20,000 targets is q - t within four standard errors."""
  teacher, student = _distributions(rng)
  log_t, log_q = (log_softmax(np.float64(x)) for x in (teacher, student))
  exact = np.exp(log_q) - np.exp(log_t)
  found = _drawn(rng, teacher, head, draws)
  gradients = _gradients(student, found)
  error = gradients.std(0) / DRAWN**0.5
  assert np.all(np.abs(gradients.mean(0) - exact) <= STANDARD_ERRORS * error + 1e-6)
  values = np.float64(
    stored.divergence(
      jnp.broadcast_to(jnp.asarray(student), (DRAWN, 30)),
      *(found[name] for name in ('ids', 'log_probs', 'entropy')),
    )
  )
  kl = (np.exp(log_t) * (log_t - log_q)).sum()
  assert abs(values.mean() - kl) <= STANDARD_ERRORS * values.std() / DRAWN**0.5 + 1e-5


def test_the_head_alone_is_biased(rng):
  """D4: it differs by more than ten standard errors of the sampled estimate of equal size."""
  teacher, student = _distributions(rng)
  exact = np.exp(log_softmax(np.float64(student))) - np.exp(log_softmax(np.float64(teacher)))
  sampled = _gradients(student, _drawn(rng, teacher, 4, 3))
  head = _gradients(student, _drawn(rng, teacher, 7, 0)).mean(0)
  error = sampled.std(0) / DRAWN**0.5
  far = np.abs(head - exact) > 10 * error + 1e-6
  assert far.mean() > 0.9
  order = np.argsort(-teacher)
  assert np.all((head - exact)[order[:7]] < 0)  # overconfident: it pulls the head up


def test_an_exact_head_and_strata_lower_the_variance(rng):
  teacher, student = _distributions(rng)
  t = np.exp(log_softmax(np.float64(teacher)))
  independent = (t * (1 - t) / 8).sum()  # of random sampling with 8 draws, by its formula
  sampled = _gradients(student, _drawn(rng, teacher, 0, 8)).var(0).sum()
  mixed = _gradients(student, _drawn(rng, teacher, 4, 4)).var(0).sum()
  assert mixed < sampled < 0.7 * independent


def test_targets_of_a_distribution_match_numpy(rng):
  teacher, _ = _distributions(rng)
  found = _drawn(rng, teacher, 4, 3, temperature=2.0)
  log_t = log_softmax(np.float64(teacher) / 2)
  top = np.argsort(-teacher)[:4]
  np.testing.assert_array_equal(found['ids'][:, :4], np.broadcast_to(top, (DRAWN, 4)))
  np.testing.assert_allclose(found['log_probs'][0], log_t[top], rtol=1e-5)
  logsumexp = np.log(np.exp(np.float64(teacher) / 2).sum())
  np.testing.assert_allclose(found['logsumexp'][0], logsumexp, rtol=1e-6)
  np.testing.assert_allclose(found['entropy'][0], -(np.exp(log_t) * log_t).sum(), rtol=1e-5)
  assert not np.isin(found['ids'][:, 4:], top).any()


def test_the_ends_of_the_random_numbers_draw_tokens_that_have_mass():
  tail = jnp.asarray([0.0, 0.0, 0.3, 0.0, 0.2, 0.0])
  for value in (0.0, 1 - 2**-24):
    drawn = targets._draw(tail, jnp.full(4, value, jnp.float32))
    assert set(np.asarray(drawn).tolist()) == {2, 4}


# --- Files ----------------------------------------------------------------------------------------


def _model(seed, layers=1, vocab_size=V):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=24)
  )
  config = ModelConfig(
    family='llama', vocab_size=vocab_size, width=16, layers=(layer,) * layers, max_positions=64
  )
  model = Transformer(config, rngs=nnx.Rngs(seed))
  for linear in linears(model).values():
    linear.weight.set_value(8 * linear.weight.get_value())
  return model


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train_bpe(['the cat and the dog'], V)


@pytest.fixture(scope='module')
def teacher():
  return _model(1, vocab_size=V + 12)  # padded


def _dataset(seed=0, batch_size=3):
  rng = np.random.default_rng(seed)
  documents = [rng.integers(1, V, rng.integers(1, 25)) for _ in range(12)]
  return PackedDataset.from_ids(documents, eos_id=0, seq_len=SEQ_LEN, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _DyingDataset(PackedDataset):
  """Raises when it is asked for a row."""

  dying_row: int

  def take(self, rows):
    if self.dying_row in rows:
      raise KeyboardInterrupt
    return super().take(rows)


def _write(folder, teacher, tokenizer, dataset=None, **changes):
  config = dataclasses.replace(CONFIG, vocabulary=V, **changes)
  targets.write(folder, teacher, dataset or _dataset(), tokenizer, config)
  return StoredTargets(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, teacher, tokenizer):
  folder = tmp_path_factory.mktemp('targets') / 'out'
  _write(folder, teacher, tokenizer)
  return folder


def _bytes(folder: pathlib.Path):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


_run = jax.jit(
  lambda graphdef, state, tokens_BT, **context: nnx.merge(graphdef, state)(tokens_BT, **context),
  static_argnums=0,
)


def _dense(model, batch, temperature):
  context = {'positions_BT': batch.positions_BT, 'segments_BT': batch.segments_BT}
  logits = _run(*nnx.split(model), batch.tokens_BT, **context)
  return np.float64(logits)[..., :V] / temperature


def test_any_row_is_read_and_has_the_teachers_distribution(folder, teacher):
  dataset, found = _dataset(), StoredTargets(folder)
  assert dataset.rows % CONFIG.rows_per_shard and len(found.about['shards']) > 2
  for rows in ([dataset.rows - 1, 0, 6], [2]):
    batch = dataset.take(rows)
    got = found.read(rows, batch)
    scaled = _dense(teacher, batch, 2.0)
    log_p = log_softmax(scaled, -1)
    picked = np.take_along_axis(log_p, got['ids'][..., :5], -1)
    np.testing.assert_allclose(got['log_probs'], picked, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(picked, -np.sort(-log_p, -1)[..., :5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got['logsumexp'], (scaled - log_p)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(got['entropy'], -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4)
    assert got['ids'].shape == (len(rows), SEQ_LEN, 11) and got['ids'].max() < V
  # Two bytes for each of 11 ids, four for each of 5 + 2 numbers, 16 for the digest of a row.
  assert found.bytes_per_token == pytest.approx(2 * 11 + 4 * 7 + 16 / SEQ_LEN, rel=0.5)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path, folder, teacher, tokenizer):
  own = {f.name: getattr(_dataset(), f.name) for f in dataclasses.fields(PackedDataset)}
  out = tmp_path / 'out'
  with pytest.raises(KeyboardInterrupt):
    _write(out, teacher, tokenizer, _DyingDataset(**own, dying_row=9))
  assert not out.exists()  # an unfinished output is none
  (partial,) = tmp_path.glob('.out.*.partial')
  assert len(list(partial.glob('rows-*'))) == 2
  (partial / '.rows-00002.safetensors.ab.partial').write_bytes(b'half')
  shard = partial / 'rows-00001.safetensors'
  shard.write_bytes(shard.read_bytes()[:-7])  # as a crash of the system may leave it
  before = shard.with_name('rows-00000.safetensors').stat().st_mtime_ns
  _write(out, teacher, tokenizer)
  assert _bytes(out) == _bytes(folder)
  assert (out / 'rows-00000.safetensors').stat().st_mtime_ns == before
  _write(out, teacher, tokenizer)  # finds its own work done
  assert (out / 'rows-00000.safetensors').stat().st_mtime_ns == before


def test_draws_depend_on_the_seed_and_the_row_alone(tmp_path, folder, teacher, tokenizer):
  rows = np.arange(_dataset().rows)
  read = lambda found: found.read(rows, _dataset().take(rows))['ids']
  want = read(StoredTargets(folder))
  other = _write(tmp_path / 'shards', teacher, tokenizer, rows_per_shard=5, batch_size=3)
  np.testing.assert_array_equal(read(other), want)
  other = _write(tmp_path / 'seed', teacher, tokenizer, seed=1)
  np.testing.assert_array_equal(read(other)[..., :5], want[..., :5])
  assert np.any(read(other)[..., 5:] != want[..., 5:])


def test_damaged_and_foreign_files_are_refused(tmp_path, teacher, tokenizer):
  found = _write(tmp_path / 'out', teacher, tokenizer)
  shard = tmp_path / 'out' / 'rows-00001.safetensors'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  with pytest.raises(ValueError, match=r'rows-00001\S+ has \d+ bytes, but .* are cut short'):
    StoredTargets(tmp_path / 'out')
  shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(ValueError, match=r'rows-00001\S+ was changed since it was written'):
    StoredTargets(tmp_path / 'out').verify()
  shard.unlink()
  with pytest.raises(ValueError, match=r'rows-00001\S+ is missing, but was written with'):
    StoredTargets(tmp_path / 'out')
  shard.write_bytes(data)
  StoredTargets(tmp_path / 'out').verify()
  about = tmp_path / 'out' / targets.ABOUT
  about.write_text(json.dumps(found.about | {'version': 0}))
  with pytest.raises(ValueError, match='holds no targets of version 1'):
    StoredTargets(tmp_path / 'out')
  with pytest.raises(ValueError, match='let the run that writes them finish'):
    StoredTargets(tmp_path)


def test_another_text_row_length_or_tokenizer_is_refused(folder, tokenizer):
  found = StoredTargets(folder)
  TargetDataset(_dataset(), found, tokenizer)
  with pytest.raises(ValueError, match='row 3 has other tokens or documents'):
    dataset = _dataset()
    stream = dataset.stream.copy()
    stream[3 * SEQ_LEN + 1] += 1
    TargetDataset(dataclasses.replace(dataset, stream=stream), found)
  with pytest.raises(ValueError, match=r'row \d has other tokens or documents'):
    dataset = _dataset()  # the same tokens, in one document
    TargetDataset(dataclasses.replace(dataset, starts=dataset.starts[:1]), found)
  with pytest.raises(ValueError, match=r'for \d+ rows of 10 tokens, but the data set has \d+ of 5'):
    TargetDataset(dataclasses.replace(_dataset(), seq_len=5), found)
  with pytest.raises(ValueError, match='targets of a teacher of another tokenizer'):
    TargetDataset(_dataset(), found, Tokenizer.train_bpe(['a horse, a zebra, a horse'], V))


@pytest.mark.parametrize(
  'settings, match',
  [
    ({'head': 0, 'draws': 0}, 'not head 0 and draws 0'),
    ({'temperature': 0.0}, r'must be positive, not 0\.0'),
    ({'dtype': 'int8'}, "dtype 'int8' is not one of float32, float16"),
    ({'rows_per_shard': 0}, 'rows_per_shard must be at least 1, not 0'),
    ({'head': V + 1}, 'a head of 261 tokens, but the vocabulary has 260'),
    ({'vocabulary': V + 13}, 'within 1 and 272, not 273'),
  ],
)
def test_bad_settings_are_named(tmp_path, teacher, tokenizer, settings, match):
  with pytest.raises(ValueError, match=match):
    config = TargetConfig(**{'vocabulary': V, **settings})
    targets.write(tmp_path / 'out', teacher, _dataset(), tokenizer, config)
  assert not (tmp_path / 'out').exists()


# --- Training -------------------------------------------------------------------------------------


def _loss(student, objective, batch, references, config=None):
  task = Task(objective=objective, references=references)
  optimizer = loop.optimizer_lib.make(OptimizerConfig(steps=1, learning_rate=1e-3))
  setup, state, frozen = step_lib.init(student, optimizer, task, config)

  def loss(trained):
    sums = setup.sums(trained, frozen, batch, jax.random.key(0))
    return sums['loss'], sums

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(state.trained)


def test_targets_that_hold_all_tokens_give_the_teachers_loss_and_gradient(
  tmp_path, teacher, tokenizer
):
  """The oracle is distillation with the teacher in memory."""
  found = _write(tmp_path / 'out', teacher, tokenizer, head=V, draws=0)
  dataset = TargetDataset(_dataset(), found, tokenizer)
  student = _model(2, vocab_size=V + 12)
  objective = StoredDistillation.of(found, soft_weight=0.8, hard_weight=0.2)
  assert (objective.temperature, objective.vocabulary) == (2.0, V)
  (_, got), gradient = _loss(student, objective, dataset.batch(5), {}, StepConfig(loss_chunk=4))
  live = Distillation(
    divergence=Divergence(temperature=2.0), soft_weight=0.8, hard_weight=0.2, vocabulary=V
  )
  batch = _dataset().batch(5)
  (_, want), want_gradient = _loss(student, live, batch, {'teacher': teacher})
  for name in ('loss', 'soft', 'hard'):
    assert float(got[name]) == pytest.approx(float(want[name]), rel=2e-5), name
  for name, array in want_gradient.items():
    scale = np.abs(np.asarray(array)).max()
    np.testing.assert_allclose(gradient[name] / scale, array / scale, atol=2e-5, err_msg=name)


def test_a_student_learns_from_a_file_and_a_killed_run_resumes_bitwise(tmp_path, folder, tokenizer):
  dataset = TargetDataset(_dataset(batch_size=4), StoredTargets(folder), tokenizer)
  task = Task(objective=StoredDistillation.of(dataset.targets))
  config = FitConfig(
    optimizer=OptimizerConfig(steps=12, learning_rate=1e-2),
    step=StepConfig(accumulation=2),
    checkpoint_every=4,
  )
  fit = lambda data, out: loop.fit(
    _model(2), data, config, task=task, folder=tmp_path / out, progress=False
  )

  class Dying(TargetDataset):
    def batch(self, step):
      if step == 6:
        raise KeyboardInterrupt
      return super().batch(step)

  whole = fit(dataset, 'whole')
  assert whole.records[-1]['soft'] < 0.8 * whole.records[0]['soft']
  with pytest.raises(KeyboardInterrupt):
    fit(Dying(dataset.dataset, dataset.targets), 'killed')
  resumed = fit(dataset, 'killed')
  leaves = lambda result: jax.tree.leaves(nnx.split(result.model)[1])
  assert all(np.array_equal(a, b) for a, b in zip(leaves(whole), leaves(resumed), strict=True))
  assert whole.records == resumed.records


@pytest.mark.slow
def test_eight_devices_learn_the_same_in_twenty_updates(folder):
  dataset = TargetDataset(_dataset(batch_size=8), StoredTargets(folder))
  task = Task(objective=StoredDistillation.of(dataset.targets, hard_weight=0.2))
  config = FitConfig(optimizer=OptimizerConfig(steps=20, learning_rate=1e-3, eps=1e-4))
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))

  def fit(model, batches=None):
    return loop.fit(
      model, dataset, config, task=task, batch_sharding=batches, progress=False
    ).records

  graphdef, state = nnx.split(_model(2))
  spread = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh, PartitionSpec())))
  one, eight = fit(_model(2)), fit(spread, NamedSharding(mesh, PartitionSpec('data')))
  for a, b in zip(one, eight, strict=True):
    assert b['loss'] == pytest.approx(a['loss'], rel=1e-5)
