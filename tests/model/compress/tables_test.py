"""Recipes that compress the embedding and the head, tied and apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import adapters, hf, kv_cache
from model.compress import pipeline, recipe
from model.eval import cost
from model.infer.prepare import prepare
from model.train.partition import Selection, partition
from model.transformer import parameters
from ops import linear, quantized
from ops.kernels.cpu.packed import PackedTensor
from ops.transposed import TransposedTensor

NEAR = 1e-5  # sums of 48 products in float32
INT8, INT4 = (
  {'round_to_nearest': {'format': 'int8'}},
  {'round_to_nearest': {'format': 'int4', 'group_size': 16, 'symmetric': False}},
)
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 9))
EMBEDDING = 'embedding.table'
logits = jax.jit(lambda model, tokens_BT: model(tokens_BT))


def _recipe(*steps, **options):
  return recipe.parse({'name': 'x', 'steps': list(steps), **options})


def _only(step, *names):
  return {**step, 'only': list(names)}


def _compressed(model, *steps, **options):
  return pipeline.compress(model, _recipe(*steps, **options))


def _table(model):
  return model.embedding.table.get_value()


def _rounded(table_VD, group: int) -> np.ndarray:
  """Asymmetric int4 by hand: 16 levels from the least to the largest of each group of a token."""
  grouped = np.asarray(table_VD, np.float64).reshape(len(table_VD), -1, group)
  low = np.minimum(grouped.min(-1, keepdims=True), 0)
  high = np.maximum(grouped.max(-1, keepdims=True), 0)
  scale = ((high - low) / 15).astype(np.float16).astype(np.float64)
  zero = np.clip(np.round(-low / scale), 0, 15)
  codes = np.clip(np.round(grouped / scale) + zero, 0, 15)
  return ((codes - zero) * scale).reshape(table_VD.shape)


@pytest.fixture(scope='module')
def tied(tiny):
  return tiny(tied=True)


@pytest.fixture(scope='module')
def with_int4(tied):
  """A tied model whose one matrix has 4 bits, and its ledger."""
  return _compressed(tied, _only(INT4, 'head'), head=True)


def test_a_tied_head_computes_what_its_rounded_table_says(tied, with_int4):
  model, ledger = with_int4
  assert isinstance(_table(model), TransposedTensor)
  expected_VD = _rounded(_table(tied), 16)
  np.testing.assert_allclose(_table(model).dense(), expected_VD, atol=NEAR)
  by_hand = nnx.clone(tied)
  by_hand.embedding.table.set_value(jnp.asarray(expected_VD, jnp.float32))
  np.testing.assert_allclose(logits(model, TOKENS_BT), logits(by_hand, TOKENS_BT), atol=NEAR)
  changed = [row for row in ledger.layers if row.layer == 'embedding']
  assert [row.stored_bytes for row in changed] == [_table(model).nbytes]
  distance = np.linalg.norm(expected_VD - _table(tied)) / np.linalg.norm(_table(tied))
  assert changed[0].relative_error == pytest.approx(distance, rel=1e-3)
  assert parameters(model).keys() == parameters(tied).keys()


@pytest.mark.parametrize('options', [{'head': True}, {'embedding': True}])
@pytest.mark.parametrize('name', ['head', 'embedding', 'embedding.table', '*'])
def test_the_one_matrix_of_a_tied_model_has_two_names(tied, options, name):
  pipeline.check(tied, _recipe(_only(INT8, name), **options))
  if name == 'embedding':
    model, _ = _compressed(tied, _only(INT8, name), **options)
    assert isinstance(_table(model).weight, quantized.QuantizedTensor)


def test_decoding_token_by_token_is_the_forward_pass(with_int4):
  model, _ = with_int4
  expected = np.asarray(logits(model, TOKENS_BT))
  rows, length = TOKENS_BT.shape

  @jax.jit
  def step(model, caches, tokens_BT, at):
    positions_BT = jnp.full_like(tokens_BT, at)
    x_BTD, caches = model.hidden(tokens_BT, positions_BT=positions_BT, cache=caches)
    return caches, model.logits(x_BTD)

  caches = kv_cache.init(model.config, rows, length)
  for t in range(length):
    caches, y_BTV = step(model, caches, TOKENS_BT[:, t : t + 1], t)
    np.testing.assert_allclose(y_BTV[:, 0], expected[:, t], atol=NEAR)


def test_packed_for_the_platform_it_predicts_the_same(with_int4):
  model, _ = with_int4
  ready = prepare(model)
  if jax.default_backend() == 'cpu' and ready is not model:
    assert isinstance(_table(ready).weight, PackedTensor)
  found, expected = logits(ready, TOKENS_BT), logits(model, TOKENS_BT)
  np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_only_a_table_that_is_multiplied_is_packed(tiny):
  untied, _ = _compressed(tiny(), _only(INT8, 'embedding'), embedding=True)
  assert isinstance(_table(prepare(untied)).weight, quantized.QuantizedTensor)
  assert not isinstance(_table(prepare(tiny(tied=True))), linear.Weight)


def test_a_folder_holds_it_bit_for_bit(with_int4, tmp_path):
  model, _ = with_int4
  hf.save_pretrained(model, None, tmp_path / 'model')
  again, _ = hf.load_pretrained(tmp_path / 'model')
  before, after = jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again))
  assert jax.tree.structure(_table(again)) == jax.tree.structure(_table(model))
  for a, b in zip(before, after, strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_embedding_and_head_of_their_own_are_compressed_apart(tiny):
  model = tiny()
  found, _ = _compressed(
    model, _only(INT4, 'embedding'), _only(INT8, 'head'), embedding=True, head=True
  )
  assert _table(found).weight.format == 'int4'
  assert found.head.weight.get_value().format == 'int8'
  changed = {p for p, v in parameters(found).items() if isinstance(v.get_value(), linear.Weight)}
  assert changed == {EMBEDDING, 'head.weight'}
  by_hand = nnx.clone(found)
  by_hand.embedding.table.set_value(jnp.asarray(_rounded(_table(model), 16), jnp.float32))
  np.testing.assert_allclose(logits(found, TOKENS_BT), logits(by_hand, TOKENS_BT), atol=NEAR)


def test_untied_the_model_computes_what_it_did(tied):
  found, _ = _compressed(tied, {'untie': {}}, _only(INT8, 'head'), head=True)
  assert not found.config.tied and not isinstance(_table(found), linear.Weight)
  head_only, _ = _compressed(tied, _only(INT8, 'head'), head=True)
  head = found.head.weight.get_value()
  np.testing.assert_array_equal(head.dense().T, _table(head_only).dense())
  found.head.weight.set_value(_table(tied).T)
  np.testing.assert_allclose(logits(found, TOKENS_BT), logits(tied, TOKENS_BT), atol=NEAR)


def test_calibration_runs_through_the_compressed_embedding(tied):
  wanda, rows_BT = {'wanda': {'n': 2, 'm': 4}}, np.tile(TOKENS_BT, (2, 1))
  steps = _only(wanda, 'layers.*'), _only(INT4, 'head')
  found, _ = pipeline.compress(tied, _recipe(*steps, head=True), rows_BT)
  assert isinstance(_table(found).weight, quantized.QuantizedTensor)
  start = nnx.clone(tied)
  start.embedding.table.set_value(jnp.asarray(_rounded(_table(tied), 16), jnp.float32))
  expected, _ = pipeline.compress(start, _recipe(wanda), rows_BT)
  of_start, _ = pipeline.compress(tied, _recipe(wanda), rows_BT)
  path = 'layers.0.attention.query.weight'
  places = [parameters(m)[path].get_value().indices for m in (found, expected, of_start)]
  np.testing.assert_array_equal(places[0], places[1])
  assert (places[1] != places[2]).any()


def test_pruned_without_a_pattern_it_stays_an_array(tied):
  found, ledger = _compressed(tied, _only({'magnitude': {'sparsity': 0.5}}, 'head'), head=True)
  zero_VD = np.asarray(_table(found)) == 0
  assert (zero_VD.sum(1) == zero_VD.shape[1] // 2).all()  # of each token
  kept = np.where(zero_VD, 0, _table(tied))
  np.testing.assert_array_equal(_table(found), kept)
  assert {row.layer: row.stored for row in ledger.layers}['embedding'] == 'float32'


def test_adapters_train_over_a_model_with_a_quantized_table(with_int4):
  model, _ = with_int4
  config = adapters.AdapterConfig(rank=2, targets=('layers.0.attention.query',))
  adapted = adapters.attach(model, config, key=jax.random.key(0))
  structure, trained, frozen = partition(adapted, Selection(value=()))
  query = 'layers.0.attention.query.weight'
  assert set(trained) == {f'{query}.a_IR', f'{query}.b_RO'}
  assert 'embedding.table.weight.values' in frozen

  @jax.jit
  def gradients(trained):
    loss = lambda own: structure.model({**own, **frozen})(TOKENS_BT).var()
    return jax.grad(loss)(trained)

  assert np.abs(gradients(trained)[f'{query}.b_RO']).max() > 0
  with pytest.raises(ValueError, match=r'embedding\.table\.weight\.values holds codes'):
    partition(adapted, Selection())


def test_a_decode_step_reads_the_codes_of_a_tied_table_and_rows_of_another(tied, with_int4, tiny):
  values = lambda model: {path: p.get_value() for path, p in parameters(model).items()}
  read = lambda model: cost.decode_bytes_per_step(model.config, values(model), 8, batch=3)
  codes = 48 * 61 // 2 + 3 * 61 * (2 + 1)  # with a scale in float16 and a zero point for 16 inputs
  assert _table(with_int4[0]).nbytes == codes
  assert read(tied) - read(with_int4[0]) == 4 * 48 * 61 - codes
  untied = tiny()
  looked_up, _ = _compressed(untied, _only(INT4, 'embedding'), embedding=True)
  assert read(untied) - read(looked_up) == 3 * (4 * 48 - codes // 61)


WRONG = {
  'a step on blocks': (
    (_only({'awq': {}}, 'head'),),
    {'head': True},
    "'head' of awq; the step works on blocks alone, so another compresses it, such as round",
  ),
  'a step that divides among blocks': (
    (_only({'owl': {}}, 'head'),),
    {'head': True},
    'blocks alone',
  ),
  'nothing for the embedding': (
    ({'awq': {}},),
    {'embedding': True},
    'no step compresses the embedding.*round_to_nearest with only',
  ),
  'not asked for': ((_only(INT8, 'head'),), {}, 'the recipe needs "head: true" for that'),
  'group': (
    (_only({'round_to_nearest': {'format': 'int4', 'group_size': 32}}, 'head'),),
    {'head': True},
    'round_to_nearest on embedding.table: a group size of 32 does not divide 48 inputs',
  ),
  'twice': ((_only(INT8, 'head'), _only(INT8, 'head')), {'head': True}, 'already quantized'),
}


@pytest.mark.parametrize('what', WRONG)
def test_what_does_not_fit_is_refused_before_any_work(what, tied):
  steps, options, message = WRONG[what]
  with pytest.raises(ValueError, match=message):
    pipeline.check(tied, _recipe(*steps, **options), TOKENS_BT)


def test_other_wrong_recipes_are_refused(tied, with_int4, tiny):
  with pytest.raises(ValueError, match='embedding is true or false'):
    _recipe(INT8, embedding='yes')
  with pytest.raises(ValueError, match='the head is not tied'):
    pipeline.check(tiny(), _recipe({'untie': {}}))
  wanda = _only({'wanda': {'n': 2, 'm': 4}}, 'embedding')
  with pytest.raises(ValueError, match='only looked up has no inputs to calibrate on, so another'):
    pipeline.check(tiny(), _recipe(wanda, embedding=True), TOKENS_BT)
  for technique in ('untie', 'prune_width'):
    with pytest.raises(ValueError, match=r'embedding\.table is a TransposedTensor'):
      pipeline.check(with_int4[0], _recipe({technique: {}}), TOKENS_BT)
  with pytest.raises(ValueError, match='embedding is compressed already; rotation comes before'):
    _compressed(with_int4[0], {'rotate': {}})
