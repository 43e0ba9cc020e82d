"""The promise of `model.layers`: a new kind is one class pair and one row, and all else follows.

The kind of this test has experts, each a small feed-forward network, and sends token t to expert
t mod E. It has no router, so every result can be computed expert by expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, config, hf, hf_names, sharding, transformer
from model.compress import calibrate, pipeline, recipe
from model.eval import cost
from model.layers import kinds
from model.layers.basic import Linear
from model.layers.block import LayerConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.sublayer import FfnConfig, Units
from model.layers.wiring import Activated, Edge, Normed
from model.transformer import Transformer
from ops import experts
from ops.linear import dense

EXPERTS = 4
# Float32 sums in another order, of values of order 1.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnsConfig(FfnConfig):
  """E networks of one width."""

  width: int
  experts: int = EXPERTS

  def build(self, stream, *, rngs, dtype):
    return Turns(self, stream, rngs=rngs, dtype=dtype)

  def edges(self, name):
    up, down = f'{name}.up', f'{name}.down'
    return (
      Edge(producer=f'{name}_norm', through=Normed(), consumers=(up,)),
      Edge(producer=up, through=Activated(function='relu'), consumers=(down,)),
    )

  def writers(self, name):
    return (f'{name}.down',)

  @property
  def active_share(self):
    return 1 / self.experts

  @property
  def units(self):
    return Units(letter='F', count=self.width, axes=('F',))

  def resized(self, count):
    return dataclasses.replace(self, width=count)

  def biased(self):
    return self


class Turns(nnx.Module):
  """down(relu(up(x))) by the expert whose turn it is."""

  def __init__(self, config, stream, *, rngs, dtype):
    self.experts = config.experts
    make = {'bias': True, 'rngs': rngs, 'dtype': dtype, 'stddev': 0.3}
    wide = (config.experts, stream.width, config.width)
    self.up = Linear(wide, axes=('E', 'D', 'F'), **make)
    self.down = Linear((wide[0], wide[2], wide[1]), axes=('E', 'F', 'D'), **make)

  def __call__(self, x_BTD):
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    order_T = np.argsort(np.arange(len(x_TD)) % self.experts, kind='stable')
    sizes_E = jnp.asarray(np.bincount(np.arange(len(x_TD)) % self.experts, minlength=self.experts))
    inner_TF = jax.nn.relu(self.up.grouped(x_TD[order_T], sizes_E))
    y_TD = self.down.grouped(inner_TF, sizes_E)
    return y_TD[np.argsort(order_T)].reshape(x_BTD.shape)


CONFIG = config.ModelConfig(
  family='llama',
  vocab_size=40,
  width=32,
  layers=(
    LayerConfig(
      mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=TurnsConfig(width=48)
    ),
  )
  * 2,
  max_positions=32,
)


@pytest.fixture(autouse=True)
def one_more_row(monkeypatch):
  monkeypatch.setitem(kinds.FFNS, 'turns', TurnsConfig)


def _model(shape=CONFIG) -> Transformer:
  model, rng = Transformer(shape, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for path, param in transformer.parameters(model).items():
    if path.endswith('.bias'):
      value = param.get_value()
      param.set_value(jnp.asarray(rng.normal(size=value.shape) / 4, value.dtype))
  return model


@pytest.fixture
def tokens_BT(rng):
  return rng.integers(0, CONFIG.vocab_size, (8, 24), np.int32)


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT))


def _inputs(model, tokens_BT):
  """What the first layer's experts see, in float64: x_ETD and the inputs of `down`, each a list."""
  block, tokens_BT = model.layers[0], jnp.asarray(tokens_BT)
  context = transformer.Context.of(model.config, tokens_BT)
  x_BTD = model.embed(tokens_BT)
  angles = context.angles[model.config.rope, block.layer.mixer.rotated]
  y_BTD, _ = block.attention(block.attention_norm(x_BTD), angles, context.mask)
  x_TD = np.float64(block.ffn_norm(x_BTD + y_BTD).reshape(-1, CONFIG.width))
  seen = [x_TD[e::EXPERTS] for e in range(EXPERTS)]
  up, bias = (np.float64(dense(p.get_value())) for p in (block.ffn.up.weight, block.ffn.up.bias))
  return seen, [np.maximum(x @ w + b, 0) for x, w, b in zip(seen, up, bias)]


def test_its_module_computes_what_its_experts_do(rng):
  model, x_BTD = _model(), rng.normal(size=(3, 7, CONFIG.width))
  ffn = model.layers[0].ffn
  y_BTD = np.asarray(jax.jit(lambda x: ffn(x))(jnp.float32(x_BTD))).reshape(21, -1)
  value = lambda param: np.float64(param.get_value())
  for t, x_D in enumerate(x_BTD.reshape(21, -1)):
    e = t % EXPERTS
    inner_F = np.maximum(x_D @ value(ffn.up.weight)[e] + value(ffn.up.bias)[e], 0)
    expected_D = inner_F @ value(ffn.down.weight)[e] + value(ffn.down.bias)[e]
    np.testing.assert_allclose(y_BTD[t], expected_D, atol=TOLERANCE)


def test_its_config_is_written_and_read_and_its_parameters_are_counted():
  assert config.from_json(config.to_json(CONFIG)) == CONFIG
  assert config.to_json(CONFIG)['layers'][0]['ffn'] == {'kind': 'turns', 'width': 48, 'experts': 4}
  own = EXPERTS * (2 * 32 * 48 + 48 + 32)
  attention = 2 * 32 * 32 + 2 * 32 * 16
  assert cost.parameters(CONFIG).non_embedding == 2 * (own + attention + 2 * 32) + 32


def test_each_expert_is_calibrated_on_its_own_tokens(tokens_BT):
  model = _model()
  stream = calibrate.Stream(model, [tokens_BT])
  found = stream.observe(model.layers[0], ('input_covariance', 'input_norm'))
  for layer, inputs in zip(('ffn.up', 'ffn.down'), _inputs(model, tokens_BT), strict=True):
    expected_EII = np.stack([x.T @ x / len(x) for x in inputs])
    np.testing.assert_allclose(
      found[layer]['input_covariance'], expected_EII, rtol=1e-3, atol=TOLERANCE
    )
  assert found['attention.query']['input_norm'].shape == (32,)


def test_a_recipe_compresses_each_expert_by_what_it_saw(tokens_BT):
  steps = [{'gptq': {'format': 'int4', 'group_size': 16}, 'only': ['*.ffn.up']}]
  steps += [{'magnitude': {'n': 2, 'm': 4}, 'only': ['*.ffn.down']}]
  parsed = recipe.parse({'name': 'x', 'steps': steps})
  model = _model()
  compressed, ledger = pipeline.compress(model, parsed, tokens_BT)
  up, w_EIO = compressed.layers[0].ffn.up.weight.get_value(), model.layers[0].ffn.up.weight
  assert (type(up).__name__, up.shape) == ('QuantizedTensor', (EXPERTS, 32, 48))
  # The theorem of GPTQ, for each expert on its own tokens: less error of the outputs than nearest.
  nearest = recipe.parse({'name': 'x', 'steps': [{'round_to_nearest': {'group_size': 16}}]})
  spec = dataclasses.replace(nearest.steps[0].spec, format='int4')
  to_dense = jax.jit(dense)
  rounded = jax.jit(lambda w_IO: dense(nearest.steps[0].row(w_IO, {}, spec).weight))
  for e, x_TD in enumerate(_inputs(model, tokens_BT)[0]):
    w_IO = np.float64(w_EIO.get_value()[e])
    error = lambda w, x=x_TD, own=w_IO: np.linalg.norm(x @ (np.float64(w) - own))
    ours = error(to_dense(experts.take(up, e)))
    assert ours < 0.9 * error(rounded(jnp.float32(w_IO)))
  down = compressed.layers[1].ffn.down.weight.get_value()
  assert (np.asarray(dense(down)).reshape(EXPERTS, 12, 4, 32) != 0).sum(2).max() == 2
  rows = {row.layer: row.shape for row in ledger.layers}
  assert rows['layers.0.ffn.up'] == (EXPERTS, 32, 48)
  assert np.isfinite(_logits(compressed, tokens_BT)).all()


@pytest.mark.parametrize('step', [{'awq': {'grid': 3, 'quantize': False}}, {'rotate': {}}])
@pytest.mark.quick(step=({'rotate': {}},))
def test_techniques_on_whole_blocks_follow_its_wiring(tokens_BT, step):
  """Scales and rotations that cancel out, with an edge through relu and a norm without a router."""
  model, parsed = _model(), recipe.parse({'name': 'x', 'steps': [step]})
  changed, _ = pipeline.compress(model, parsed, tokens_BT)
  up = changed.layers[0].ffn.up.weight.get_value()
  assert np.abs(np.asarray(up) - np.asarray(model.layers[0].ffn.up.weight.get_value())).max() > 0.1
  np.testing.assert_allclose(_logits(changed, tokens_BT), _logits(model, tokens_BT), atol=1e-4)


@pytest.mark.parametrize('shape', [{'expert': 4, 'model': 2}, {'data': 2, 'expert': 2, 'fsdp': 2}])
@pytest.mark.quick(shape=({'data': 2, 'expert': 2, 'fsdp': 2},))
def test_its_experts_are_saved_loaded_and_divided_among_devices(tmp_path, tokens_BT, shape):
  parsed = recipe.parse({'name': 'x', 'steps': [{'round_to_nearest': {'format': 'int8'}}]})
  model, _ = pipeline.compress(_model(), parsed)
  expected = _logits(model, tokens_BT)
  checkpoint.save(tmp_path / 'orbax', model)
  mesh = sharding.make_mesh(**shape)
  loaded = checkpoint.load(tmp_path / 'orbax', mesh)
  up = loaded.layers[0].ffn.up
  specs = [a.sharding.spec for a in jax.tree.leaves((up.weight.get_value(), up.bias.get_value()))]
  assert all(spec[0] == 'expert' for spec in specs) and specs[-1][1] == (
    'model' if 'model' in shape else None
  )
  placed = jax.device_put(tokens_BT, sharding.batch_sharding(mesh))
  np.testing.assert_allclose(_logits(loaded, placed), expected, atol=TOLERANCE)
  with pytest.raises(ValueError, match='cannot describe the TurnsConfig of layer 0'):
    hf_names.config_to_hf(CONFIG)
  hf.save_pretrained(model, None, tmp_path / 'folder')  # in our own format
  again, _ = hf.load_pretrained(tmp_path / 'folder')
  assert again.config == CONFIG
  np.testing.assert_array_equal(_logits(again, tokens_BT), expected)


def test_its_channels_are_removed_from_all_experts_at_once(tokens_BT):
  step = {'prune_ffn': {'ratio': 0.25, 'multiple': 4, 'importance': 'weights'}}
  model = _model()
  smaller, _ = pipeline.compress(model, recipe.parse({'name': 'x', 'steps': [step]}))
  assert [layer.ffn for layer in smaller.config.layers] == [TurnsConfig(width=36)] * 2
  assert smaller.layers[0].ffn.up.bias.get_value().shape == (EXPERTS, 36)
  score = sum(
    np.square(np.float64(dense(param.get_value()))).sum(axes)
    for param, axes in (
      (model.layers[0].ffn.up.weight, (0, 1)),
      (model.layers[0].ffn.up.bias, 0),
      (model.layers[0].ffn.down.weight, (0, 2)),
    )
  )
  kept = np.sort(np.argsort(-score)[:36])
  np.testing.assert_array_equal(
    smaller.layers[0].ffn.up.weight.get_value(),
    model.layers[0].ffn.up.weight.get_value()[:, :, kept],
  )
