"""The pipeline: what it leaves alone, what it refuses before any work, and what it writes down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.compress import calibrate, pipeline, recipe, registry
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears, matrices, parameters
from ops import quantized, sparse
from ops.linear import dense

INT8 = {'round_to_nearest': {'format': 'int8'}}
WANDA = {'wanda': {'sparsity': 0.5}}


def _recipe(*steps, **fields):
  return recipe.parse({'name': 'x', 'steps': list(steps), **fields})


def _values(model):
  return {path: param.get_value() for path, param in parameters(model).items()}


def _same(a, b) -> bool:
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)) for x, y in leaves
  )


def _changed(before, after) -> set[str]:
  return {path for path in before if not _same(before[path], after[path])}


TARGETS = [
  ({**INT8, 'only': ['layers.0.ffn.*']}, ['0.ffn.gate', '0.ffn.up', '0.ffn.down']),
  (
    {**INT8, 'only': ['*.query', 'layers.1.*.key']},
    ['0.attention.query', '1.attention.query', '1.attention.key'],
  ),
  ({**WANDA, 'only': ['layers.1.attention.output']}, ['1.attention.output']),
  ({'magnitude': {'n': 2, 'm': 4}, 'only': ['layers.[1].ffn.down']}, ['1.ffn.down']),
  (
    {'cast': {}, 'only': ['layers.1.ffn.up', 'layers.0.*norm*']},
    ['1.ffn.up', '0.attention_norm.scale', '0.ffn_norm.scale'],
  ),
]


@pytest.mark.parametrize('step, expected', TARGETS)
def test_what_is_not_targeted_stays_bitwise_the_same(tiny, tokens_BT, step, expected):
  model = tiny()
  compressed, _ = pipeline.compress(model, _recipe(step), tokens_BT)
  changed = _changed(_values(model), _values(compressed))
  assert {path.removesuffix('.weight') for path in changed} == {
    f'layers.{path}' for path in expected
  }


def test_linears_alone_are_compressed_and_the_head_on_request(tiny):
  model = tiny()
  plain, _ = pipeline.compress(model, _recipe(INT8))
  changed = _changed(_values(model), _values(plain))
  assert changed == {f'{path}.weight' for path in linears(model) if path != 'head'}
  with_head, _ = pipeline.compress(model, _recipe(INT8, head=True))
  assert _changed(_values(plain), _values(with_head)) == {'head.weight'}
  assert isinstance(matrices(with_head)['head'], quantized.QuantizedTensor)


def test_cast_reaches_every_parameter(tiny):
  compressed, ledger = pipeline.compress(tiny(), _recipe({'cast': {}}))
  assert {w.dtype for w in _values(compressed).values()} == {jnp.dtype(jnp.bfloat16)}
  assert ledger.events == []


def test_the_input_model_is_never_changed(tiny, tokens_BT):
  model = tiny()
  before = {path: np.array(w) for path, w in _values(model).items()}
  steps = {'cast': {}}, {'wanda': {'n': 2, 'm': 4}}, INT8
  compressed, _ = pipeline.compress(model, _recipe(*steps, head=True), tokens_BT)
  assert _changed(before, _values(model)) == set()
  assert _changed(before, _values(compressed)) == set(before)
  assert compressed is not model


def test_the_same_inputs_give_the_same_model(tiny, tokens_BT):
  one = _recipe(WANDA, {'round_to_nearest': {'format': 'int4'}})
  first, second = (pipeline.compress(tiny(), one, tokens_BT)[0] for _ in range(2))
  assert _changed(_values(first), _values(second)) == set()


def test_wanda_is_what_numpy_computes(tiny, tokens_BT, torch_inputs):
  model = tiny()
  compressed, _ = pipeline.compress(model, _recipe(WANDA, sequential='blocks'), tokens_BT)
  first = _recipe({**WANDA, 'only': ['layers.0.*']}, sequential='blocks')
  half_done, _ = pipeline.compress(model, first, tokens_BT)
  sources = (torch_inputs(model, tokens_BT), torch_inputs(half_done, tokens_BT))
  for i, inputs in enumerate(sources):
    for path, x_TI in inputs.items():
      if path.startswith(f'layers.{i}.'):
        w_IO = np.asarray(matrices(model)[path])
        score_IO = np.abs(w_IO) * np.linalg.norm(x_TI, axis=0)[:, None]
        order_IO = np.argsort(score_IO, axis=0)
        expected_IO = w_IO.copy()
        np.put_along_axis(expected_IO, order_IO[: len(w_IO) // 2], 0, axis=0)
        np.testing.assert_array_equal(matrices(compressed)[path], expected_IO, err_msg=path)


def test_steps_compose_into_nested_weights(tiny, tokens_BT):
  steps = {'cast': {}}, {'wanda': {'n': 2, 'm': 4}}, INT8
  compressed, ledger = pipeline.compress(tiny(), _recipe(*steps), tokens_BT)
  weight = matrices(compressed)['layers.0.ffn.up']
  assert isinstance(weight, sparse.SparseTensor)
  assert isinstance(weight.values, quantized.QuantizedTensor)
  assert ((np.asarray(dense(weight), np.float32) != 0).reshape(12, 4, -1).sum(1) <= 2).all()
  row = next(row for row in ledger.layers if row.layer == 'layers.0.ffn.up')
  # 24 x 80 codes, 80 float32 scales, 2-bit indices.
  assert row.stored_bytes == 24 * 80 + 80 * 4 + 24 * 80 // 4
  assert row.stored == 'SparseTensor 2 4 of QuantizedTensor int8 24'
  assert row.shape == (48, 80)


def test_the_ledger_says_how_many_calibration_rows_repeat(tiny, tokens_BT):
  repeated_BT = tokens_BT[[0, 1, 2, 3, 4, 5, 0, 0, 3]]
  _, ledger = pipeline.compress(tiny(), _recipe(WANDA), repeated_BT)
  row = next(row for row in ledger.events if 'calibration rows' in row.event)
  assert (row.layer, row.technique, row.detail) == ('model', 'calibration', '3')
  assert row.event.endswith('6 of 9 are distinct')
  _, ledger = pipeline.compress(tiny(), _recipe(WANDA), tokens_BT)
  assert not any('calibration rows' in row.event for row in ledger.events)


def test_the_ledger_says_how_far_each_layer_moved(tiny):
  model = tiny()
  compressed, ledger = pipeline.compress(model, _recipe({'magnitude': {}}))
  assert sorted(row.layer for row in ledger.layers) == sorted(matrices(model))
  for row in ledger.layers:
    w, now = (np.asarray(matrices(m)[row.layer]) for m in (model, compressed))
    expected = np.linalg.norm(w - now) / np.linalg.norm(w)
    assert row.relative_error == pytest.approx(expected, rel=1e-5)


def test_a_fallback_of_the_group_size_is_an_event(tiny):
  _, ledger = pipeline.compress(
    tiny(layers=1, width=96), _recipe({'round_to_nearest': {'format': 'int4'}})
  )
  rows = {(row['layer'], row['event'], row['detail']) for row in ledger.to_rows()}
  assert ('layers.0.ffn.up', 'group size, because 128 does not divide 96 inputs', '32') in rows
  assert ('layers.0.ffn.down', 'group size, because 128 does not divide 80 inputs', '16') in rows
  assert len(rows) == 7
  assert {row['technique'] for row in ledger.to_rows()} == {'round_to_nearest'}


def test_a_group_size_that_was_asked_for_is_no_event(tiny):
  step = {'round_to_nearest': {'format': 'int4', 'group_size': 16}}
  assert pipeline.compress(tiny(), _recipe(step))[1].events == []


def test_inputs_that_no_token_used_are_an_event(tiny, tokens_BT):
  model = tiny()
  scale = model.layers[1].ffn_norm.scale
  scale.set_value(scale.get_value().at[:5].set(0))
  _, ledger = pipeline.compress(model, _recipe(WANDA), tokens_BT)
  expected = [('layers.1.ffn.gate', '5'), ('layers.1.ffn.up', '5')]
  assert [(row['layer'], row['detail']) for row in ledger.to_rows()] == expected
  assert ledger.events[0].event == 'inputs that no calibration token used'
  assert ledger.events[0].technique == 'wanda'


def test_overflow_is_an_event(tiny):
  model = tiny()
  weight = model.layers[0].ffn.up.weight
  weight.set_value(weight.get_value().at[0, :3].set(1e6))
  _, ledger = pipeline.compress(model, _recipe({'cast': {'dtype': 'float16'}}))
  assert [(row['layer'], row['detail']) for row in ledger.to_rows()] == [('layers.0.ffn.up', '3')]


def test_a_head_that_a_step_does_not_reach_is_an_event(tiny, tokens_BT):
  owl = {'owl': {'sparsity': 0.5}}
  compressed, ledger = pipeline.compress(tiny(), _recipe(owl, INT8, head=True), tokens_BT)
  why = 'left as it was, because the step works on blocks alone'
  rows = [(row['layer'], row['technique'], row['event']) for row in ledger.to_rows()]
  assert rows == [('head', 'owl', why)]
  assert isinstance(matrices(compressed)['head'], quantized.QuantizedTensor)


REFUSED = {
  'group size': (
    [{'round_to_nearest': {'format': 'int4', 'group_size': 64}}],
    r'recipe x: round_to_nearest on layers\.0\.\S+: a group size of 64 does not divide 48 inputs',
  ),
  'N of M': (
    [{'magnitude': {'n': 3, 'm': 9}}],
    r'magnitude on layers\.0\.\S+: 48 inputs do not divide into groups of 9',
  ),
  'N of M on one layer': (
    [{'magnitude': {'n': 3, 'm': 5}, 'only': ['*.down', 'layers.1.ffn.up']}],
    r'magnitude on layers\.1\.ffn\.up\S*: 48 inputs do not divide into groups of 5',
  ),
  'quantized twice': ([INT8, INT8], r'already quantized \(int8\)'),
  'pruned twice': ([{'magnitude': {'n': 2, 'm': 4}}, {'magnitude': {}}], 'not a SparseTensor'),
  'cast after quantization': ([INT8, {'cast': {}}], 'put that step before the quantization'),
  'no such layer': (
    [{**INT8, 'only': ['layers.7.*']}],
    r"no layer matches 'layers\.7\.\*' of round_to_nearest; there are layers\.0\.attention",
  ),
  'one pattern of two': ([{**INT8, 'only': ['*.up', '*.upp']}], r"no layer matches '\*\.upp'"),
  'head that is not asked for': ([{**INT8, 'only': ['head']}], "no layer matches 'head'"),
  'no calibration text': ([WANDA], 'recipe x: wanda needs calibration text'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_work_is_refused_before_any_work(tiny, monkeypatch, case):
  steps, message = REFUSED[case]
  model = tiny()
  with pytest.raises(ValueError, match=message):
    pipeline.check(model, _recipe(*steps))
  monkeypatch.setattr(nnx, 'clone', _forbidden)
  monkeypatch.setattr(calibrate, 'Stream', _forbidden)
  with pytest.raises(ValueError, match=message):
    pipeline.compress(model, _recipe(*steps), progress=_forbidden)


def _forbidden(*args):
  raise AssertionError('work was done')


@pytest.mark.parametrize(
  'tokens, message',
  [
    (np.zeros((0, 8), np.int32), r'rows of token ids \[rows, length\], not \(0, 8\)'),
    (np.zeros((3, 0), np.int32), r'not \(3, 0\)'),
    (np.zeros(8, np.int32), r'not \(8,\)'),
    (np.full((2, 3), 61), 'the token 61, outside the vocabulary of 61'),
    (np.full((2, 3), -1), 'the token -1, outside'),
  ],
)
def test_calibration_text_that_is_not_the_models_is_refused(tiny, tokens, message):
  with pytest.raises(ValueError, match=message):
    pipeline.compress(tiny(), _recipe(WANDA), tokens, progress=_forbidden)


def test_calibration_text_beyond_learned_positions_is_refused(tiny):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=8),
    ffn=FeedForwardConfig(width=32, gated=False),
  )
  config = tiny().config.replace(family='gpt2', layers=(layer,), rope=None, max_positions=8)
  model = Transformer(config, rngs=nnx.Rngs(0))
  pipeline.check(model, _recipe(WANDA), np.zeros((2, 8), np.int32))
  with pytest.raises(ValueError, match='rows of 9 tokens are longer than the 8 learned'):
    pipeline.check(model, _recipe(WANDA), np.zeros((2, 9), np.int32))


def test_check_does_no_work_where_all_is_well(tiny, tokens_BT, monkeypatch):
  model = tiny()
  monkeypatch.setattr(calibrate, 'Stream', _forbidden)
  before = _values(model)
  steps = {'cast': {}}, {'wanda': {'n': 2, 'm': 4}}, {'round_to_nearest': {'format': 'int4'}}
  pipeline.check(model, _recipe(*steps, head=True), tokens_BT)
  assert all(now is before[path] for path, now in _values(model).items())


def test_matrices_that_are_alike_are_checked_once(tiny, monkeypatch):
  row = registry.TECHNIQUES['round_to_nearest']
  traced = []

  def function(w, statistics, spec):
    traced.append(w.shape)
    return row.function(w, statistics, spec)

  watched = dataclasses.replace(row, function=function)
  monkeypatch.setitem(registry.TECHNIQUES, 'round_to_nearest', watched)
  model = tiny(layers=3)
  pipeline.check(model, _recipe({'round_to_nearest': {'format': 'int8'}}))
  shapes = [w.shape for block in model.layers for w in pipeline.matrices(block).values()]
  assert sorted(traced) == sorted(set(shapes)) and len(traced) < len(shapes)


HALF, TWO_OF_FOUR = {'magnitude': {'sparsity': 0.5}}, {'magnitude': {'n': 2, 'm': 4}}
HQQ, UP = {'hqq': {'group_size': 8}}, {'only': ['*.up']}
LOSES_ZEROS = {
  'hqq after pruning': ([HALF, HQQ], 'hqq on layers.0.*what magnitude set to zero would not stay'),
  'hqq after sparsegpt': ([{'sparsegpt': {}}, HQQ], 'what sparsegpt set to zero would not stay'),
  'hqq after both kinds': ([WANDA, TWO_OF_FOUR, HQQ], 'what wanda set to zero would not stay'),
  'hqq of one layer': ([HALF, {**HQQ, **UP}], 'hqq on layers.0.ffn.up.weight: what magnitude'),
  'pruning after hqq': ([HQQ, HALF], 'magnitude on layers.0.*zero has no code.*prune n of m'),
  'groups across n of m': (
    [{'round_to_nearest': {'group_size': 12}, **UP}, {'magnitude': {'n': 4, 'm': 8}, **UP}],
    'magnitude on layers.0.ffn.up.weight: a scale is shared by 12 inputs.*groups of 8 for 4:8',
  ),
}


@pytest.mark.parametrize('what', LOSES_ZEROS)
def test_steps_that_would_undo_pruning_are_refused(tiny, tokens_BT, what):
  steps, message = LOSES_ZEROS[what]
  model = tiny()
  before = _values(model)
  with pytest.raises(ValueError, match=message):
    pipeline.compress(model, _recipe(*steps), tokens_BT, in_place=True)
  assert _changed(before, _values(model)) == set()


def test_hqq_of_a_model_that_was_pruned_before_is_refused(tiny):
  pruned, _ = pipeline.compress(tiny(), _recipe(HALF))
  with pytest.raises(ValueError, match='an earlier pruning set to zero would not stay zero'):
    pipeline.compress(pruned, _recipe(HQQ))


@pytest.mark.parametrize('steps', [[TWO_OF_FOUR, HQQ], [HQQ, TWO_OF_FOUR]])
@pytest.mark.quick(steps=([TWO_OF_FOUR, HQQ],))
def test_zeros_that_are_not_stored_go_with_hqq(tiny, steps):
  compressed, _ = pipeline.compress(tiny(), _recipe(*steps))
  for path, w in matrices(compressed).items():
    if path != 'head':
      kept = (np.asarray(dense(w)) != 0).reshape(-1, 4, w.shape[1]).sum(1)
      assert isinstance(w, sparse.SparseTensor) and (kept <= 2).all() and kept.mean() > 1


@pytest.mark.parametrize('format', ['int4', 'nvfp4'])
@pytest.mark.quick(format=('nvfp4',))
def test_half_of_the_weights_stay_zero_in_formats_that_hold_zero(tiny, format):
  rounded = {'round_to_nearest': {'format': format}}
  for steps in ([HALF, rounded], [rounded, HALF]):
    compressed, _ = pipeline.compress(
      tiny(),
      _recipe(*steps),
    )
    zeros = [
      (np.asarray(dense(w)) == 0).mean() for p, w in matrices(compressed).items() if p != 'head'
    ]
    assert min(zeros) >= 0.5
