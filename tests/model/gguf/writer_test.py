"""Files that are written: against the converter's form, the other reader, and ours."""

import dataclasses
import functools
import json
import types

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from gguf import GGMLQuantizationType as Kind

from model import hf
from model.gguf import architectures, to_tokenizer, writer
from model.gguf.container import Container
from model.transformer import parameters
from ops import lora, quantized
from ops.activations import ActivationQuantized
from ops.transposed import TransposedTensor

LOGIT_TOLERANCE = 2e-4  # of float32 sums in another order; logits are of order 1
TABLE_TOLERANCE = 5e-3  # llama.cpp looks GELU up in a table of float16
NORM_TOLERANCE = 2.0**-21  # bits of a norm that has one added and taken off again
FACTOR_TOLERANCE = 1e-6  # of quotients of float32 numbers
FLOAT32_STEPS = 1e-5  # of products that are added in another order
SHAPE = {
  'vocab_size': 99,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'head_dim': 16,
  'pad_token_id': None,
}


def _rope(kind, **values):
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': 500.0, **values}}


_LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
_BASE = {'rope_type': 'default', 'rope_theta': 1e4}
# A case, the class in transformers, and what differs from SHAPE.
CASES = {
  'llama': {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True},
  'llama-llama3': {
    'head_dim': 32,
    **_rope('llama3', original_max_position_embeddings=32, **_LLAMA3),
  },
  'llama-linear': _rope('linear', factor=3.0),
  'mistral': {'sliding_window': None},
  'qwen2': _rope('yarn', factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
  'qwen3': {'head_dim': 24},
  'gemma2': {'head_dim': 24, 'query_pre_attn_scalar': 24, 'sliding_window': 8},
  'gemma3_text': {
    'head_dim': 24,
    'query_pre_attn_scalar': 24,
    'sliding_window': 8,
    'rope_parameters': {
      'full_attention': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e6},
      'sliding_attention': _BASE,
    },
  },
  'smollm3': {'num_hidden_layers': 4, **_rope('default')},
  'olmo2': {},
  'granite': {
    'embedding_multiplier': 3.0,
    'logits_scaling': 2.0,
    'residual_multiplier': 0.5,
    'attention_multiplier': 0.3,
  },
  'phi3': {'sliding_window': 8, **_rope('default', partial_rotary_factor=0.75)},
  'gpt2': {'n_embd': 64, 'n_layer': 2, 'n_head': 4, 'n_positions': 48},
  'gpt_neox': {'rope_parameters': {**_BASE, 'partial_rotary_factor': 0.25}},
}


def _build(case, **changes):
  family = case.partition('-')[0]
  arguments = json.loads(json.dumps({**SHAPE, **CASES[case], **changes}))
  if family in ('gpt_neox', 'gpt2', 'olmo2', 'qwen2', 'phi3', 'smollm3', 'granite'):
    arguments.pop('head_dim')  # width / heads
  config = transformers.AutoConfig.for_model(family, **arguments)
  model = transformers.AutoModelForCausalLM.from_config(config)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():  # every parameter differs from its initial value
    for parameter in model.parameters():
      parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def _values(model):
  return {path: param.get_value() for path, param in parameters(model).items()}


def _write(path, model, **types):
  return writer.write(path, model, None, writer.Types(**types))


def test_every_architecture_has_a_case():
  covered = {architectures.name_of(case.partition('-')[0]) for case in CASES}
  assert covered == set(architectures.ARCHITECTURES)


@pytest.mark.parametrize('case', CASES)
def test_a_file_is_what_the_converter_writes_and_comes_back(case, write_gguf, tmp_path):
  model, _ = hf.load_pretrained(write_gguf(_build(case), tmp_path / 'theirs.gguf'))
  _write(tmp_path / 'ours.gguf', model, matrices='f32')
  theirs, ours = (gguf.GGUFReader(tmp_path / f'{name}.gguf') for name in ('theirs', 'ours'))
  _assert_same_keys(ours, theirs)
  norms = NORM_TOLERANCE if case in ('gemma2', 'gemma3_text') else 0
  expected = {tensor.name: tensor.data for tensor in theirs.tensors}
  assert {tensor.name for tensor in ours.tensors} == set(expected)
  for tensor in ours.tensors:
    assert tensor.tensor_type == Kind.F32
    rtol = FACTOR_TOLERANCE if tensor.name == 'rope_freqs.weight' else 0
    np.testing.assert_allclose(
      tensor.data, expected[tensor.name], rtol=rtol, atol=norms, err_msg=tensor.name
    )
  again, _ = hf.load_pretrained(tmp_path / 'ours.gguf')
  assert again.config == model.config or case == 'llama-llama3'
  for path, value in _values(again).items():
    np.testing.assert_allclose(value, _values(model)[path], rtol=0, atol=norms)


def _assert_same_keys(ours, theirs):
  left_out = ('GGUF.', 'general.', 'tokenizer.')
  keys = {key for key in theirs.fields if not key.startswith(left_out)}
  assert keys - set(ours.fields) == set()
  for key in keys:
    # A window of 0 is none.
    assert ours.fields[key].contents() == theirs.fields[key].contents(), key
    assert ours.fields[key].types == theirs.fields[key].types, key


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A model whose matrices have 64 and 96 inputs."""
  folder = tmp_path_factory.mktemp('llama')
  _build('llama').save_pretrained(folder)
  return hf.load_pretrained(folder)[0]


@pytest.fixture
def with_weights(llama):
  """A function that gives a copy of the model with other weights in some layers."""

  def change(functions):
    params = parameters(llama)
    kept = {path: param.get_value() for path, param in params.items()}
    for layer, function in functions.items():
      params[f'{layer}.weight'].set_value(function(kept[f'{layer}.weight']))
    saved.update(kept)
    return llama

  saved = {}
  yield change
  for path, value in saved.items():
    parameters(llama)[path].set_value(value)


def _to(format, group_size=None, *, symmetric=True, fine=False):
  """A function that gives a matrix of random codes in a format, in place of another of its shape.

  `fine`: scales and zero points of float32 numbers, which are none of float16.
  """

  def change(w):
    rng, (inputs, outputs) = np.random.default_rng(0), w.shape
    bits, groups = quantized.FORMATS[format].bits, inputs // (group_size or inputs)
    codes = rng.integers(0, 2**bits, (inputs, outputs)).astype(np.uint8)
    stream = (codes[:, None] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    values = np.packbits(stream.reshape(-1, outputs), axis=0, bitorder='little')
    if bits == 8:
      values = codes.view(np.int8) if symmetric else codes
    scales = rng.uniform(0.001, 0.01, (groups, outputs)).astype(np.float32 if fine else np.float16)
    if symmetric:
      scales *= rng.choice([-1, 1], scales.shape).astype(scales.dtype)
    zeros = rng.integers(0, 2**bits, (groups, outputs)).astype(np.uint8)
    arrays = (jnp.asarray(values), jnp.asarray(scales), None if symmetric else jnp.asarray(zeros))
    return quantized.QuantizedTensor(*arrays, format, inputs, jnp.dtype(jnp.float32))

  return change


# A layer, the function that makes its weight, and the type that holds its codes.
COPIED = {
  'layers.0.attention.query': (_to('int4', 32), 'Q4_0'),
  'layers.0.attention.key': (_to('int3', 32), 'Q4_0'),
  'layers.0.attention.value': (_to('int4', 32, fine=True), 'Q4_0'),
  'layers.0.attention.output': (_to('int4', 64), 'Q4_0'),
  'layers.0.ffn.gate': (_to('int4', 32, symmetric=False), 'Q4_1'),
  'layers.0.ffn.up': (_to('int8', 32), 'Q8_0'),
  'layers.1.ffn.down': (_to('int2', symmetric=False, fine=True), 'Q4_1'),
  'layers.1.ffn.up': (lambda w: ActivationQuantized(_to('int8', fine=True)(w), None, 8), 'Q8_0'),
}


def _repeated(count, a_JO):
  return np.repeat(np.asarray(a_JO, np.float32), count, axis=0)


def test_codes_are_copied(with_weights, tmp_path):
  model = with_weights({layer: function for layer, (function, _) in COPIED.items()})
  rows = {row.name: row for row in _write(tmp_path / 'm.gguf', model)}
  tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / 'm.gguf').tensors}
  again, values = _values(hf.load_pretrained(tmp_path / 'm.gguf')[0]), _values(model)
  names = {row.ours[0]: row.theirs for row in architectures.ARCHITECTURES['llama'].rows}
  for layer, (_, kind) in COPIED.items():
    _, l, rest = layer.split('.', 2)
    name = names[f'layers.{{l}}.{rest}'].format(l=l) + '.weight'
    assert tensors[name].tensor_type.name == rows[name].kind == kind, name
    assert rows[name].how.startswith('codes copied'), name
    w = values[f'{layer}.weight']
    w = w.values if isinstance(w, ActivationQuantized) else w
    codes_IO = np.asarray(w.codes(), np.float32)
    wide = functools.partial(_repeated, w.group_size)
    low_IO = 0 if w.zeros is None else wide(w.zeros) * wide(w.scales)
    steps = (again[f'{layer}.weight'] - (codes_IO * wide(w.scales) - low_IO)) / wide(w.scales)
    top = 2.0 ** quantized.FORMATS[w.format].bits
    rounded = 'rounded to float16' in rows[name].how
    assert np.abs(steps).max() <= (top * 2.0**-11 if rounded else FLOAT32_STEPS), name
  assert rows['blk.1.ffn_up.weight'].how.endswith('inputs rounded as llama.cpp does')
  assert rows['blk.0.attn_q.weight'].how == 'codes copied'
  assert rows['blk.0.attn_v.weight'].how == 'codes copied, scales rounded to float16'
  assert rows['blk.0.ffn_gate.weight'].how == 'codes copied, minima rounded to float16'
  plain = writer.Written(name='blk.1.attn_q.weight', kind='F16', how='rounded')
  assert rows['blk.1.attn_q.weight'] == plain


def test_codes_are_those_of_the_file_bit_for_bit(with_weights, tmp_path):
  """Queries of llama lie in pairs, so their rows are compared one by one."""
  model = with_weights({'layers.0.ffn.down': _to('int4', 32)})
  _write(tmp_path / 'm.gguf', model)
  stored = next(t for t in gguf.GGUFReader(tmp_path / 'm.gguf').tensors if 'ffn_down' in t.name)
  w = _values(model)['layers.0.ffn.down.weight']
  rows = np.asarray(stored.data).reshape(64, 3, 18)
  codes_OI = np.concatenate([rows[:, :, 2:] & 15, rows[:, :, 2:] >> 4], axis=-1).reshape(64, 96)
  np.testing.assert_array_equal(codes_OI, np.asarray(w.stored_codes()).T)
  scales_OJ = np.ascontiguousarray(rows[:, :, :2]).view(np.float16)[..., 0]
  np.testing.assert_array_equal(scales_OJ, np.asarray(w.scales).T)


@pytest.mark.parametrize('change, kind', [(_to('int8', 32), 'Q8_0'), (_to('int4', 32), 'Q4_0')])
def test_codes_of_a_tied_table_are_copied(change, kind, llama, tmp_path):
  model = nnx.clone(llama)
  table = model.embedding.table
  w = TransposedTensor(change(table.get_value().T))
  table.set_value(w)
  rows = {row.name: row for row in _write(tmp_path / 'm.gguf', model)}
  assert rows['token_embd.weight'].how == 'codes copied'
  tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / 'm.gguf').tensors}
  stored = tensors['token_embd.weight']
  assert stored.tensor_type.name == kind and 'output.weight' not in tensors
  found_VD = gguf.quants.dequantize(stored.data, stored.tensor_type)
  np.testing.assert_array_equal(found_VD, w.dense())


def test_other_weights_are_widened(with_weights, tmp_path):
  adapter = lambda w: lora.LoraTensor(
    _to('int4', 32)(w), jnp.ones((64, 2)), jnp.full((2, 64), 0.01), 1.0
  )
  model = with_weights(
    {
      'layers.0.attention.query': adapter,
      'layers.0.attention.output': _to('nf4', 32),
      'layers.0.ffn.up': _to('int4', 16),
      'layers.0.ffn.gate': _to('int8', symmetric=False),
    }
  )
  rows = _write(tmp_path / 'm.gguf', model, rest='bf16')
  how = {row.name: row.how for row in rows}
  assert how['blk.0.attn_q.weight'] == 'LoraTensor widened, then rounded'
  for part in ('attn_output', 'ffn_up', 'ffn_gate'):
    assert how[f'blk.0.{part}.weight'] == 'QuantizedTensor widened, then rounded'
  assert writer.summary(rows)[0].split() == ['BF16', '11', 'rounded']
  again = _values(hf.load_pretrained(tmp_path / 'm.gguf')[0])
  for path, w in _values(model).items():
    expected = np.asarray(quantized.dense(w), jnp.bfloat16 if len(w.shape) > 1 else np.float32)
    np.testing.assert_array_equal(again[path], expected.astype(np.float32), err_msg=path)


@pytest.mark.parametrize('kind', ['f16', 'bf16', 'q8_0', 'q4_0', 'q4_1', 'q5_0', 'q5_1'])
def test_rounding_is_that_of_the_gguf_package(kind, llama, tmp_path):
  _write(tmp_path / 'm.gguf', llama, matrices=kind)
  tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / 'm.gguf').tensors}
  down_OI = np.asarray(_values(llama)['layers.1.ffn.down.weight']).T
  expected = gguf.quants.quantize(np.ascontiguousarray(down_OI), Kind[kind.upper()])
  found = tensors['blk.1.ffn_down.weight']
  assert found.tensor_type.name == kind.upper()
  np.testing.assert_array_equal(found.data.view(np.uint8), expected.view(np.uint8))
  head = tensors['token_embd.weight'].tensor_type.name  # tied
  assert head == (kind.upper() if kind in ('f16', 'bf16', 'q8_0') else 'Q8_0')


@pytest.mark.parametrize(
  'kind, inputs, expected',
  [
    ('Q4_K', 512, 'Q4_K'),
    ('Q4_K', 96, 'Q5_0'),
    ('Q6_K', 96, 'Q8_0'),
    ('Q4_K', 48, 'F16'),
    ('Q4_0', 48, 'F16'),
    ('BF16', 7, 'BF16'),
  ],
)
def test_rows_that_blocks_do_not_divide_are_stored_as_llama_cpp_does(kind, inputs, expected):
  assert writer._fitting(Kind[kind], inputs) == Kind[expected]


def test_what_takes_the_place_of_a_type_is_said(llama, tmp_path):
  rows = {row.name: row for row in _write(tmp_path / 'm.gguf', llama, matrices='q4_k')}
  row = rows['blk.0.ffn_down.weight']
  assert row.kind == 'Q5_0'
  assert row.how == 'rounded, in place of Q4_K, whose blocks do not divide 96 inputs'


def test_a_window_that_llama_cpp_ignores_is_said(llama):
  sliding = llama.config.layers[0].with_mixer(window=8)
  model = types.SimpleNamespace(config=llama.config.replace(layers=(sliding,) * 2))
  assert writer._window_notes(model) == ['llama.cpp ignores the window of 8 tokens']
  assert writer._window_notes(llama) == []


def test_bad_input(llama, tmp_path):
  with pytest.raises(ValueError, match=r"the type 'q4_2' is not one of auto, f32, f16"):
    writer.Types(matrices='q4_2')
  with pytest.raises(ValueError, match=r'm\.bin does not end in \.gguf'):
    _write(tmp_path / 'm.bin', llama)
  with pytest.raises(ValueError, match="the family 'mixtral' are not written; written are gemma2"):
    architectures.name_of('mixtral')
  params = parameters(llama)['layers.0.ffn.up.weight']
  kept = params.get_value()
  params.set_value(kept.at[0, 0].set(1e6))
  try:
    with pytest.raises(ValueError, match=r'blk\.0\.ffn_up\.weight: the largest weight is 1e\+06'):
      _write(tmp_path / 'm.gguf', llama, matrices='f16')
    assert list(tmp_path.iterdir()) == []
  finally:
    params.set_value(kept)


@pytest.mark.parametrize(
  'change, match',
  [
    (
      lambda c: c.replace(rope=dataclasses.replace(c.rope, theta=500.0, kind='ntk', factor=2.0)),
      'ntk',
    ),
    (lambda c: c.replace(embedding_scale=2.0), 'embedding_scale'),
    (
      lambda c: c.replace(layers=(c.layers[0].with_mixer(window=8), c.layers[1])),
      r'layers 0: mixer\.window = 8',
    ),
  ],
)
def test_a_model_that_a_file_cannot_describe_is_refused(change, match, llama, tmp_path):
  kept = llama.config
  llama.config = change(kept)
  try:
    with pytest.raises(ValueError, match=match):
      _write(tmp_path / 'm.gguf', llama)
  finally:
    llama.config = kept


@pytest.mark.parametrize('case', CASES)
def test_llama_cpp_computes_the_same(case, byte_level, tmp_path):
  llama_cpp = pytest.importorskip('llama_cpp')
  tokens = byte_level['tokenizer.ggml.tokens']
  windows = {'sliding_window': None} if case == 'phi3' else {}  # llama.cpp ignores it
  _build(case, vocab_size=len(tokens), **windows).save_pretrained(tmp_path)
  model, _ = hf.load_pretrained(tmp_path)
  tokenizer = to_tokenizer(Container(tmp_path, byte_level, {}))
  writer.write(tmp_path / 'm.gguf', model, tokenizer, writer.Types(matrices='f32'))
  options = {'n_ctx': 48, 'logits_all': True, 'verbose': False, 'type_k': 0, 'type_v': 0}
  theirs = llama_cpp.Llama(str(tmp_path / 'm.gguf'), n_threads_batch=1, **options)
  ids = np.random.default_rng(0).integers(0, len(tokens) - 1, 40).tolist()
  theirs.eval(ids)
  ours = np.asarray(model(jnp.asarray([ids], jnp.int32)))[0]
  atol = TABLE_TOLERANCE if model.config.layers[0].ffn.activation != 'silu' else LOGIT_TOLERANCE
  np.testing.assert_allclose(ours, theirs.scores[:40], rtol=0, atol=atol)
