"""Structured pruning: exact where it must be, scores against brute force, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from model import hf, units
from model.compress import calibrate, pipeline, recipe, slicing
from model.compress.importance import score
from model.compress.measurements import Measurements
from model.transformer import matrices, parameters
from ops import quantized

# Of the largest logit: removed terms are exact zeros, but a norm adds its epsilon to another mean.
EXACT = 2e-6
INT4 = {'round_to_nearest': {'format': 'int4', 'group_size': 8}}


def _recipe(*steps, **fields):
  return recipe.parse({'name': 'x', 'steps': list(steps), **fields})


def _tokens(model, rows=4):
  return np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, 11), np.int32)


def _near(found, expected, tolerance=EXACT):
  return np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def _widths(model):
  return [
    (layer.ffn.width, layer.mixer.kv_heads, layer.mixer.query_heads)
    for layer in model.config.layers
  ]


@pytest.mark.parametrize('name', ['gemma2', 'gpt2'])
@pytest.mark.quick(name=('gpt2',))
def test_dimensions_that_stay_zero_can_go(tiny_of, logits_of, name):
  """Norms are rescaled for the smaller width; the remaining dimensions are centred for GPT-2."""
  model = tiny_of(name, norm_eps=1e-12)
  gone = np.array([0, 3, 10, 11, 40, 41, 42, 63])
  stay = np.setdiff1d(np.arange(64), gone)
  for path, param in parameters(model).items():
    letters, value = units.letters(model)[path], np.array(param.get_value())
    if letters[-1] == 'D' and 'norm.scale' not in path:
      value[..., gone] = 0
      if model.config.norm == 'layer' and 'norm' not in path:
        value[..., stay] -= value[..., stay].mean(-1, keepdims=True)
      param.set_value(jnp.asarray(value))
  step = {'prune_width': {'ratio': 0.125, 'multiple': 8, 'importance': 'activations'}}
  smaller, ledger = pipeline.compress(model, _recipe(step), _tokens(model))
  assert smaller.config.width == 56
  tokens_BT = _tokens(model)
  assert _near(logits_of(smaller, tokens_BT), logits_of(model, tokens_BT))
  rows = [(row['layer'], row['event'], row['detail']) for row in ledger.to_rows()]
  assert rows == [('model', 'dimensions of the residual stream removed, of 64', '8')]


def test_channels_and_heads_of_no_effect_go_first(tiny_of, logits_of):
  model = tiny_of('neox')
  for l, block in enumerate(model.layers):
    down, out = block.ffn.down.weight, block.attention.output.weight
    down.set_value(down.get_value().at[l : 96 + l].set(0))
    out.set_value(out.get_value().at[16 * l : 16 * l + 16].set(0))
  steps = {'prune_ffn': {'ratio': 0.375}}, {'prune_heads': {'ratio': 0.25}}
  smaller, ledger = pipeline.compress(model, _recipe(*steps), _tokens(model))
  assert _widths(smaller) == [(160, 3, 3)] * 2
  tokens_BT = _tokens(model)
  assert _near(logits_of(smaller, tokens_BT), logits_of(model, tokens_BT))
  assert [(row['layer'], row['technique'], row['detail']) for row in ledger.to_rows()] == [
    ('layers.0', 'prune_ffn', '96'),
    ('layers.1', 'prune_ffn', '96'),
    ('layers.0', 'prune_heads', '1'),
    ('layers.1', 'prune_heads', '1'),
  ]


def test_the_score_by_output_is_the_error_of_each_single_removal(tiny_of):
  """By brute force, for a block whose output is the sum of attention and feed-forward."""
  model = tiny_of('llama')
  layer = dataclasses.replace(model.config.layers[0], parallel=True)
  model = tiny_of('llama', layers=(layer,))
  tokens_BT = _tokens(model, rows=8)
  stream = calibrate.Stream(model, calibrate.batches(tokens_BT, 8))
  measured = Measurements(model, tokens_BT)
  for unit, path, run in (('F', 'ffn.down', 1), ('K', 'attention.output', 32)):
    w_IO = matrices(model)[f'layers.0.{path}']
    count = w_IO.shape[0] // run
    remove = _Removal(f'{path}.weight', run)
    errors = stream.errors(model.layers[0], remove, w_IO, count)
    (scores,) = score(model, measured, unit, 'output')
    assert len(scores) == count > 1
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(errors))
    ratio = np.square(scores) / errors
    np.testing.assert_allclose(ratio / ratio.mean(), 1, rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class _Removal:
  path: str
  run: int

  def __call__(self, parameters, w_IO, k):
    rows_I = jnp.arange(w_IO.shape[0]) // self.run
    return {self.path: jnp.where((rows_I == k)[:, None], 0, w_IO)}


def test_activations_and_influence_are_what_transformers_computes(tiny, tokens_BT, tmp_path):
  model = tiny(layers=2)
  hf.save_pretrained(model, None, tmp_path / 'm')
  other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'm').eval()
  seen = {}
  for name, module in other.named_modules():
    if name.endswith(('down_proj', 'o_proj', 'q_proj', 'gate_proj', 'lm_head')):
      module.register_forward_pre_hook(
        lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1).numpy()})
      )
  with torch.no_grad():
    states = other(torch.from_numpy(tokens_BT).long(), output_hidden_states=True).hidden_states
  measured = Measurements(model, tokens_BT)
  for l, (channels, heads) in enumerate(
    zip(score(model, measured, 'F', 'activations'), score(model, measured, 'K', 'activations'))
  ):
    down_TF = seen[f'model.layers.{l}.mlp.down_proj']
    np.testing.assert_allclose(channels, np.linalg.norm(down_TF, axis=0), rtol=1e-4)
    grouped = seen[f'model.layers.{l}.self_attn.o_proj'].reshape(-1, 2, 32)
    np.testing.assert_allclose(heads, np.linalg.norm(grouped, axis=(0, 2)), rtol=1e-4)
  normed = [x for name, x in seen.items() if name.endswith(('q_proj', 'gate_proj', 'lm_head'))]
  (dimensions,) = score(model, measured, 'D', 'activations')
  assert len(normed) == 5
  np.testing.assert_allclose(dimensions, np.linalg.norm(np.concatenate(normed), axis=0), rtol=1e-4)
  x, y = (state.numpy().astype(np.float64) for state in states[:2])  # the last one is normed
  cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
  assert measured.influence()[0] == pytest.approx(1 - cosine.mean(), rel=1e-4)


@pytest.mark.parametrize('unit', ['F', 'K', 'D'])
def test_the_score_by_weights_is_the_norm_of_all_that_goes(tiny_of, unit):
  model = tiny_of('gpt2')
  whole = {path: np.asarray(p.get_value(), np.float64) for path, p in parameters(model).items()}
  squares = lambda values: sum(np.square(np.asarray(v, np.float64)).sum() for v in values.values())
  found = score(model, None, unit, 'weights')
  for i in (0, 3):
    stay = [np.delete(np.arange(n), i) if n > 3 else None for n in units.sizes(model.config, unit)]
    one = [stay[0], *(np.arange(n) for n in units.sizes(model.config, unit)[1:])]
    _, values = units.cut(model, units.keep(unit, one))
    assert found[0][i] == pytest.approx((squares(whole) - squares(values)) ** 0.5, rel=1e-4)


FAMILIES = ('llama', 'gemma2', 'gpt2', 'neox', 'phi3', 'qwen3')


def _cut(model, **kept):
  return units.build(*units.cut(model, units.Kept(**kept)))


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.quick(name=('gemma2', 'gpt2', 'phi3'))
def test_transformers_loads_what_is_pruned_evenly(tiny_of, logits_of, tmp_path, name):
  model = tiny_of(name)
  layer = model.config.layers[0]
  kept = {'channels': {1: np.arange(3, layer.ffn.width - 7)}, 'layers': [1]}
  if (
    layer.mixer.kv_heads < layer.mixer.query_heads or name == 'phi3'
  ):  # others derive the width of a head
    kept['heads'] = {1: np.arange(1, layer.mixer.kv_heads, 2)}
  smaller = _cut(model, **kept)
  hf.save_pretrained(smaller, None, tmp_path / 'm')
  loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'm', attn_implementation='eager', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  assert loaded.config.num_hidden_layers == 1
  tokens_BT = _tokens(model)
  with torch.no_grad():
    theirs = loaded.eval()(torch.from_numpy(tokens_BT).long()).logits.numpy()
  assert _near(logits_of(smaller, tokens_BT), theirs, 1e-5)


def _merged(model):
  values = {path: jnp.float32(value) for path, value in slicing.merge_norms(model).items()}
  return units.build(slicing.merged_config(model.config), values)


NATIVE = {
  'uneven widths': ('llama', lambda m: _cut(m, channels={0: np.arange(64)})),
  'embedding scale of another width': ('gemma2', lambda m: _cut(m, width=np.arange(48))),
  'width that the heads do not divide': ('llama', lambda m: _cut(m, width=np.arange(50))),
  'fewer heads of the same width': (
    'gpt2',
    lambda m: _cut(m, heads={l: np.arange(3) for l in range(2)}),
  ),
  'biases that the family lacks': ('gpt2', _merged),
}


@pytest.mark.parametrize('case', NATIVE)
@pytest.mark.quick(
  case=('uneven widths', 'fewer heads of the same width', 'biases that the family lacks')
)
def test_what_config_json_cannot_say_is_saved_in_our_own_form(
  tiny_of, logits_of, tmp_path, case, caplog
):
  name, change = NATIVE[case]
  smaller = change(tiny_of(name))
  hf.save_pretrained(smaller, None, tmp_path / 'm')
  assert json.loads((tmp_path / 'm' / 'config.json').read_text())['model_type'] == 'lissom'
  assert 'saved in the format of Lissom' in caplog.text
  again, _ = hf.load_pretrained(tmp_path / 'm')
  assert again.config == smaller.config
  tokens_BT = _tokens(smaller)
  np.testing.assert_array_equal(logits_of(again, tokens_BT), logits_of(smaller, tokens_BT))


def test_uneven_layers_keep_as_many_channels_in_all(tiny_of):
  model = tiny_of('llama')
  for name in ('gate', 'up'):
    w = getattr(model.layers[1].ffn, name).weight
    w.set_value(w.get_value().at[:, :100].multiply(1e-3))
  step = {'prune_ffn': {'ratio': 0.4, 'multiple': 8, 'uneven': True}}
  smaller, _ = pipeline.compress(model, _recipe(step), _tokens(model))
  (first, *_), (second, *_) = _widths(smaller)
  assert first + second == 2 * 88 and second in (48, 56) and first % 8 == 0


def test_refitting_brings_the_feed_forward_nearer(tiny_of, logits_of):
  model = tiny_of('llama')
  tokens_BT = _tokens(model, rows=24)  # 264 tokens determine 112 channels
  expected, errors = logits_of(model, tokens_BT), []
  for refit in (False, True):
    step = {'prune_ffn': {'refit': refit}}
    smaller, _ = pipeline.compress(model, _recipe(step), tokens_BT)
    errors.append(np.square(logits_of(smaller, tokens_BT) - expected).mean())
  assert errors[1] < 0.8 * errors[0]


def test_the_pruned_model_is_quantized_by_later_steps(tiny_of):
  model = tiny_of('llama')
  steps = {'prune_ffn': {'importance': 'weights'}}, {'cast': {}}, INT4
  smaller, ledger = pipeline.compress(model, _recipe(*steps), _tokens(model))
  down = matrices(smaller)['layers.1.ffn.down']
  assert down.shape == (112, 64) and isinstance(down, quantized.QuantizedTensor)
  assert {row.layer: row.shape for row in ledger.layers}['layers.0.ffn.up'] == (64, 112)
  assert _widths(model) == [(152, 2, 4)] * 2  # the model that was given is not changed


REFUSED = {
  'a group that does not divide the width that is left': (
    [{'prune_ffn': {'ratio': 0.25, 'multiple': 8}}, {**INT4, 'round_to_nearest': {
      'format': 'int4', 'group_size': 32}}],
    r'layers\.0\.ffn\.down\.weight: a group size of 32 does not divide 112 inputs',
  ),
  'a group that does not divide all that may be left': (
    [{'prune_ffn': {'uneven': True, 'multiple': 4}}, INT4],
    r'ffn\.down\.weight: a group size of 8 does not divide 4 inputs',
  ),
  'layers of different widths': (
    [{'prune_ffn': {'uneven': True}}, {'prune_ffn': {}}],
    r'prune_ffn: the layers have different numbers of feed-forward channels: \[16, 208\]',
  ),
  'after another step': (
    [{'cast': {}}, {'prune_ffn': {}}],
    'prune_ffn changes the whole model, so it has to come before cast',
  ),
  'after a rotation': (
    [{'rotate': {}}, {'drop_layers': {}}],
    'drop_layers changes the whole model, so it has to come before rotate',
  ),
  'layers by name': ([{'prune_ffn': {}, 'only': ['layers.0*']}], 'prune_ffn changes .* no "only"'),
  'layers that went': (
    [{'drop_layers': {'ratio': 0.5}}, {**INT4, 'only': ['layers.1.*']}],
    r"no layer matches 'layers\.1\.\*' of round_to_nearest",
  ),
  'too much': ([{'prune_heads': {'ratio': 0.9}}], 'recipe x: prune_heads: 0.2 key/value heads'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_work_is_refused_before_any_work(tiny_of, monkeypatch, case):
  steps, message = REFUSED[case]
  model = tiny_of('llama')
  monkeypatch.setattr(calibrate, 'Stream', None)
  with pytest.raises(ValueError, match=message):
    pipeline.compress(model, _recipe(*steps), _tokens(model))


def test_a_width_without_norms_before_its_readers_is_not_scored(tiny_of):
  model = tiny_of('olmo2')
  with pytest.raises(ValueError, match=r'recipe x: prune_width: .* some layers lack; prune_ffn'):
    pipeline.check(model, _recipe({'prune_width': {}}), _tokens(model))
  pipeline.check(model, _recipe({'prune_ffn': {}}, {'drop_layers': {'ratio': 0.5}}), _tokens(model))


def test_only_some_importances_need_calibration_text(tiny_of):
  model = tiny_of('llama')
  with pytest.raises(ValueError, match='prune_ffn needs calibration text'):
    pipeline.check(model, _recipe({'prune_ffn': {}}))
  with pytest.raises(ValueError, match='prune_ffn needs calibration text'):
    pipeline.check(model, _recipe({'prune_ffn': {'importance': 'weights', 'refit': True}}))
  step = {'prune_ffn': {'importance': 'weights'}}
  smaller, _ = pipeline.compress(model, _recipe(step))
  assert _widths(smaller) == [(112, 2, 4)] * 2


def test_what_is_compressed_already_is_refused(tiny_of):
  model, _ = pipeline.compress(tiny_of('llama'), _recipe(INT4))
  with pytest.raises(ValueError, match=r'recipe x: prune_heads: layers\.0\S* is a Quantized'):
    pipeline.check(model, _recipe({'prune_heads': {'importance': 'weights'}}))


def test_layers_take_no_latency():
  with pytest.raises(ValueError, match='drop_layers: layers take equally long'):
    _recipe({'drop_layers': {'latency': 0.5}})


def test_dropped_layers_are_those_of_least_influence(tiny_of, logits_of):
  layers = tiny_of('llama').config.layers
  model = tiny_of('llama', layers=(*layers, *layers))
  for linear in (model.layers[2].attention.output, model.layers[2].ffn.down):
    linear.weight.set_value(linear.weight.get_value() * 0)
  tokens_BT = _tokens(model)
  influence = Measurements(model, tokens_BT).influence()
  assert abs(influence[2]) < 1e-6 < influence[[0, 1, 3]].min()
  smaller, ledger = pipeline.compress(model, _recipe({'drop_layers': {}}), tokens_BT)
  assert len(smaller.config.layers) == 3
  assert _near(logits_of(smaller, tokens_BT), logits_of(model, tokens_BT))
  assert [(row['layer'], row['event']) for row in ledger.to_rows()] == [
    ('layers.2', 'layer removed')
  ]


def test_interrupted_after_a_change_of_shapes_it_is_not_made_again(tiny_of, tmp_path, monkeypatch):
  model = tiny_of('llama')
  steps = {'prune_ffn': {'importance': 'weights'}}, {'drop_layers': {'ratio': 0.5}}, INT4
  run = lambda **options: pipeline.compress(model, _recipe(*steps), _tokens(model), **options)
  whole, expected = run()
  folder = tmp_path / 'progress'

  def stop(parts):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(resume=folder, progress=stop)
  assert sorted(path.name for path in folder.iterdir()) == [
    'model_1.json',
    'model_1.safetensors',
    'plan.json',
  ]
  monkeypatch.setattr(Measurements, 'influence', None)
  again, ledger = run(resume=folder)
  assert again.config == whole.config and not folder.exists()
  assert (ledger.to_rows(), ledger.layers) == (expected.to_rows(), expected.layers)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
