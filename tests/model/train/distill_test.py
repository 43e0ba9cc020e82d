"""Distillation against plain sums over all logits, and features against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from model import presets
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.linear import linear_attention
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.distill import Distillation
from model.train.features import Hidden, Relations
from model.train.step import StepConfig, Task
from model.transformer import Context, Transformer, linears, parameters
from ops import quantized
from ops.divergences import Divergence

VALUE, GRADIENT = 1e-6, 1e-5  # relative, between chunked and dense float32
TWENTY_UPDATES = 2e-4  # of gradients and weights, where each update adds to the rounding
V = 32
ALL = Distillation(
  divergence=Divergence(kind='jsd', mix=0.3, temperature=2.0),
  soft_weight=0.7,
  hard_weight=0.3,
  features=(Hidden(weight=0.5), Relations(heads=2, teacher_layer=0, weight=2.0)),
)


def _model(seed=0, *, width=16, layers=1, vocab_size=V, kv_heads=1, spread=8.0):
  """A model whose predictions differ from those of another seed, unlike those of fresh ones."""
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=kv_heads, head_width=8),
    ffn=FeedForwardConfig(width=24),
  )
  config = ModelConfig(
    family='llama', vocab_size=vocab_size, width=width, layers=(layer,) * layers, max_positions=64
  )
  model = Transformer(config, rngs=nnx.Rngs(seed))
  for linear in linears(model).values():
    linear.weight.set_value(spread * linear.weight.get_value())
  return model


def _batch(rng, rows=4, length=12):
  documents = [rng.integers(1, V, rng.integers(1, 20)) for _ in range(20)]
  dataset = PackedDataset.from_ids(documents, eos_id=0, seq_len=length, batch_size=rows)
  return jax.tree.map(jnp.asarray, dataset.batch(0))


def _start(student, teacher, objective, config=None, optimizer=None):
  task = Task(objective=objective, references={'teacher': teacher})
  return step_lib.init(student, optimizer or optax.sgd(0.1), task, config)


def _value_and_gradient(student, teacher, objective, batch, config=None):
  setup, state, frozen = _start(student, teacher, objective, config)
  key = jax.random.key(0)

  def loss(trained):
    sums = setup.sums(trained, frozen, batch, key)
    return sums['loss'], sums

  (_, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.trained)
  return sums, gradient


def _sums(student, teacher, objective, batch):
  setup, state, frozen = _start(student, teacher, objective)
  sums = lambda trained: setup.sums(trained, frozen, batch, jax.random.key(0))
  return jax.jit(sums)(state.trained)


def _logits(model, batch):
  return model(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)


def _assert_relative(got, want, tolerance):
  assert got.keys() == want.keys()
  for name in want:
    scale = np.abs(np.asarray(want[name])).max() + 1e-12
    np.testing.assert_allclose(got[name] / scale, want[name] / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
@pytest.mark.quick(temperature=(2.0,))
def test_chunks_give_the_value_and_the_gradient_of_all_logits_at_once(rng, temperature):
  """D8, with the forward KL of Hinton et al. written out."""
  student, teacher, batch = _model(1, layers=2), _model(2), _batch(rng)
  graphdef, params = nnx.split(student)
  real_BT = batch.labels_BT >= 0

  def dense(params):
    z_BTV = _logits(nnx.merge(graphdef, params), batch)
    log_p, log_q = (
      jax.nn.log_softmax(logits / temperature) for logits in (_logits(teacher, batch), z_BTV)
    )
    soft_BT = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    hard_BT = optax.softmax_cross_entropy_with_integer_labels(z_BTV, batch.labels_BT * real_BT)
    return jnp.sum(jnp.where(real_BT, 0.8 * soft_BT + 0.2 * hard_BT, 0.0))

  value, gradient = jax.jit(jax.value_and_grad(dense))(params)
  want = {n: p.get_value() for n, p in parameters(nnx.merge(graphdef, gradient)).items()}
  objective = Distillation(
    divergence=Divergence(temperature=temperature), soft_weight=0.8, hard_weight=0.2
  )
  sums, got = _value_and_gradient(student, teacher, objective, batch, StepConfig(loss_chunk=8))
  assert float(sums['loss']) == pytest.approx(float(value), rel=VALUE)
  assert float(sums['loss']) == pytest.approx(float(0.8 * sums['soft'] + 0.2 * sums['hard']))
  _assert_relative(got, want, GRADIENT)


@pytest.mark.slow
def test_another_size_of_chunk_gives_the_same_of_every_part(rng):
  student, teacher, batch = _model(1), _model(2), _batch(rng)
  run = functools.partial(_value_and_gradient, student, teacher, ALL, batch)
  want_sums, want = run(StepConfig(loss_chunk=10**6))
  sums, got = run(StepConfig(loss_chunk=20))
  _assert_relative(sums, want_sums, VALUE)
  _assert_relative(got, want, GRADIENT)
  assert want_sums.keys() == {'loss', 'soft', 'hard', 'hidden_cosine', 'relations'}
  assert all(float(value) > 0 for value in want_sums.values())


def test_no_logits_of_all_tokens_are_held_and_memory_falls_with_the_chunk(rng):
  rows, length, vocabulary = 4, 128, 4096
  student, teacher = (_model(seed, vocab_size=vocabulary) for seed in (1, 2))
  batch = _batch(rng, rows, length)
  logits_bytes = 4 * rows * length * vocabulary
  shape = f'f32[{rows},{length},{vocabulary}]'
  setup, state, frozen = _start(student, teacher, Distillation())

  def compiled(chunk):
    part = dataclasses.replace(setup, config=StepConfig(loss_chunk=chunk))
    return step_lib.make_step(part, state).lower(state, frozen, batch).compile()

  programs = [compiled(chunk) for chunk in (512, 128, 32)]
  assert [shape in program.as_text() for program in programs] == [True, False, False]
  whole, quarter, sixteenth = (p.memory_analysis().temp_size_in_bytes for p in programs)
  assert whole > 4 * logits_bytes  # of both models, their softmaxes and gradients
  # A part that does not depend on the chunk, and one that is proportional to it.
  assert quarter - sixteenth < 1.3 * (96 / 480) * (whole - sixteenth)
  assert sixteenth < whole / 7


@pytest.mark.parametrize('kind, width', [('cosine', 16), ('mse', 8)])
def test_hidden_states_match_numpy_and_their_projection_is_trained(rng, kind, width):
  student, teacher, batch = _model(1, width=width), _model(2), _batch(rng)
  objective = Distillation(soft_weight=0.0, features=(Hidden(kind=kind),))
  setup, state, frozen = _start(student, teacher, objective)
  names = {name for name in state.trained if name.startswith('objective.')}
  assert names == (set() if width == 16 else {'objective.projection'})
  hidden = lambda model: np.float64(
    model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)[0]
  )
  x, y = hidden(student), hidden(teacher)
  if names:
    x = x @ np.float64(state.trained['objective.projection'])
  norm = lambda a: np.sqrt((a * a).sum(-1))
  want = {'cosine': 1 - (x * y).sum(-1) / (norm(x) * norm(y)), 'mse': ((x - y) ** 2).mean(-1)}
  want = want[kind][np.asarray(batch.labels_BT) >= 0].sum()
  before = {name: np.asarray(state.trained[name]) for name in names}
  state, metrics = step_lib.make_step(setup, state)(state, frozen, batch)
  assert float(metrics[f'hidden_{kind}']) * int(metrics['tokens']) == pytest.approx(want, rel=1e-5)
  assert float(metrics['loss']) == pytest.approx(float(metrics[f'hidden_{kind}']))
  assert all(np.any(np.asarray(state.trained[name]) != before[name]) for name in names)
  assert set(setup.model(state.trained, frozen).config.layers) == set(student.config.layers)


def _relations_by_loops(student, teacher, batch, heads, layers):
  """MiniLM v2, token by token in float64, from the input of the layers."""
  projected = []
  for model, layer in zip((student, teacher), layers):
    context = Context.of(model.config, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    x = model.embed(batch.tokens_BT, batch.positions_BT)
    for block in list(model.layers)[:layer]:
      x, _ = context.run(block, x)
    x, block = np.float64(x), model.layers[layer]
    scale = np.float64(block.attention_norm.scale.get_value())
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.norm_eps) * scale
    attention = block.attention
    weights = [attention.query, attention.key, attention.value]
    split = lambda y: rearrange(y, 'b t (a h) -> a b t h', a=heads)
    projected.append([split(x @ np.float64(w.weight.get_value())) for w in weights])
  labels, segments = np.asarray(batch.labels_BT), np.asarray(batch.segments_BT)
  total = 0.0
  for row, t in zip(*np.nonzero(labels >= 0)):
    seen = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
    for ours, theirs in zip(*projected):
      for head in range(heads):
        q, p = (
          _softmax(part[head, row, seen] @ part[head, row, t] / np.sqrt(part.shape[-1]))
          for part in (ours, theirs)
        )
        total += (p * np.log(p / q)).sum() / heads
  return total


def _softmax(x):
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def test_relations_match_loops_between_models_of_other_widths_and_heads(rng):
  student, teacher, batch = (
    _model(1, width=8, layers=2),
    _model(2, kv_heads=2, layers=3),
    _batch(rng),
  )
  objective = Distillation(soft_weight=0.0, features=(Relations(heads=4, teacher_layer=-2),))
  sums, gradient = _value_and_gradient(student, teacher, objective, batch, StepConfig(loss_chunk=8))
  want = _relations_by_loops(student, teacher, batch, 4, (1, 1))
  assert float(sums['relations']) == pytest.approx(want, rel=1e-4)
  moved = {name for name, array in gradient.items() if np.any(np.asarray(array))}
  assert {f'layers.1.attention.{name}.weight' for name in ('query', 'key', 'value')} <= moved
  assert not any(name.startswith(('layers.1.ffn', 'head', 'final_norm')) for name in moved)
  assert all(np.isfinite(np.asarray(array)).all() for array in gradient.values())


@pytest.mark.slow
def test_relations_share_the_forward_pass_of_the_hidden_states(rng):
  student, teacher, batch = _model(1, layers=4), _model(2, layers=4), _batch(rng)

  def flops(features):
    objective = Distillation(features=features)
    setup, state, frozen = _start(student, teacher, objective)
    sums = lambda trained: setup.sums(trained, frozen, batch, jax.random.key(0))['loss']
    return jax.jit(sums).lower(state.trained).compile().cost_analysis()['flops']

  # The highest layer also needs the blocks below it, which would be half as much again.
  low, high = (flops((Relations(heads=2, student_layer=at, teacher_layer=at),)) for at in (0, 3))
  assert high < 1.1 * low


def test_a_compressed_teacher_counts_as_its_dense_form(rng):
  (student, teacher), batch = (_model(seed) for seed in (1, 2)), _batch(rng)
  dense = _model(2)
  for path, linear in linears(teacher).items():
    w = quantized.quantize(linear.weight.get_value(), 'int8')
    linear.weight.set_value(w)
    linears(dense)[path].weight.set_value(w.dense())
  got, want = (_sums(student, each, ALL, batch) for each in (teacher, dense))
  _assert_relative(got, want, 1e-5)


def _padded(model, tokens):
  """The same model with junk in more rows of its embedding and head."""
  config = model.config.replace(vocab_size=model.config.vocab_size + tokens)
  wide = Transformer(config, rngs=nnx.Rngs(9))
  for path, param in parameters(model).items():
    if path == 'embedding.table':
      param = jnp.concatenate([param.get_value(), jnp.ones((tokens, config.width))])
    elif path == 'head.weight':
      param = jnp.concatenate([param.get_value(), jnp.ones((config.width, tokens))], axis=1)
    else:
      param = param.get_value()
    parameters(wide)[path].set_value(param)
  return wide


def test_padded_vocabularies_count_as_their_real_length(rng):
  student, teacher, batch = _model(1), _model(2), _batch(rng)
  want = _sums(student, teacher, Distillation(), batch)
  objective = Distillation(vocabulary=V)
  got, gradient = _value_and_gradient(_padded(student, 3), _padded(teacher, 9), objective, batch)
  assert float(got['soft']) == pytest.approx(float(want['soft']), rel=VALUE)
  assert not np.any(np.asarray(gradient['head.weight'])[:, V:])


def test_a_student_comes_near_its_teacher_which_stays(rng):
  student, teacher, batch = _model(1), _model(2), _batch(rng)
  before = [np.asarray(x) for x in jax.tree.leaves(nnx.split(teacher)[1])]
  objective = dataclasses.replace(ALL, hard_weight=0.0)
  setup, state, frozen = _start(student, teacher, objective, optimizer=optax.adam(3e-3))
  step = step_lib.make_step(setup, state)
  history = []
  for _ in range(60):
    state, metrics = step(state, frozen, batch)
    history.append({name: float(value) for name, value in metrics.items()})
  for name in ('soft', 'hidden_cosine', 'relations'):
    assert history[-1][name] < 0.5 * history[0][name], name
  after = [np.asarray(x) for x in jax.tree.leaves(frozen.references)]
  assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.slow
def test_micro_batches_and_eight_devices_give_the_same_in_twenty_updates(rng):
  batch = _batch(rng, rows=8)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def update(config, mesh=None):
    models = [_model(1, width=8), _model(2)]
    if mesh is not None:
      models = [nnx.merge(g, jax.device_put(s, everywhere)) for g, s in map(nnx.split, models)]
    setup, state, frozen = _start(*models, ALL, config)
    placed = (
      batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))
    )
    step = step_lib.make_step(setup, state)
    for _ in range(20):
      state, metrics = step(state, frozen, placed)
    return state.trained, metrics

  want, want_metrics = update(StepConfig())
  for got, metrics in (update(StepConfig(accumulation=4)), update(StepConfig(), mesh)):
    norms = metrics.pop('grad_norm'), want_metrics['grad_norm']
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=TWENTY_UPDATES)
    sums = {name: value for name, value in want_metrics.items() if name != 'grad_norm'}
    _assert_relative(metrics, sums, 1e-5)
    _assert_relative(got, want, TWENTY_UPDATES)


def _config(**changes):
  return dataclasses.replace(_model().config, **changes)


def _recurrent():
  config = _config()
  layer = dataclasses.replace(config.layers[0], mixer=linear_attention(2, 8, 8))
  return config.replace(layers=(layer,))


@pytest.mark.parametrize(
  'objective, teacher, match',
  [
    (Distillation(), _config(vocab_size=40), '32 tokens and the teacher 40: a teacher of another'),
    (Distillation(vocabulary=33), _config(vocab_size=40), 'within 1 and 32, not 33'),
    (
      Distillation(features=(Relations(heads=2, teacher_layer=2),)),
      _config(),
      'the teacher has the layers 0 to 0, and 2 is none of them',
    ),
    (
      Distillation(features=(Relations(heads=16),)),
      _config(),
      '16 relation heads do not divide the 8 numbers of the student: kv_heads 1 of width 8',
    ),
    (
      Distillation(features=(Relations(heads=2),)),
      presets.preset('tiny-deepseek-v3').replace(vocab_size=32),
      'layer -1 of the teacher has no attention .* it is a LatentConfig',
    ),
    (
      Distillation(features=(Relations(heads=2),)),
      _recurrent(),
      'layer -1 of the teacher has no attention .* it is a LinearConfig',
    ),
  ],
)
def test_a_teacher_that_does_not_suit_is_refused_before_any_work(objective, teacher, match):
  with pytest.raises(ValueError, match=match):
    objective.check(_model().config, {'teacher': teacher})


def test_a_missing_teacher_and_bad_settings_are_named():
  with pytest.raises(ValueError, match="needs a reference 'teacher'; the task has base"):
    Distillation().check(_config(), {'base': _config()})
  with pytest.raises(ValueError, match='nothing to learn'):
    Distillation(soft_weight=0.0)
  with pytest.raises(ValueError, match=r'must not be negative, as 1\.0 or -0\.1 is'):
    Distillation(hard_weight=-0.1)
  with pytest.raises(ValueError, match='each feature may occur once'):
    Distillation(features=(Hidden(), Hidden(weight=2.0)))
  with pytest.raises(ValueError, match="kind 'l1' is not one of cosine, mse"):
    Hidden(kind='l1')
  with pytest.raises(ValueError, match='at least 1 relation head, not 0'):
    Relations(heads=0)
  with pytest.raises(ValueError, match='must be positive, not 0'):
    Hidden(weight=0)
