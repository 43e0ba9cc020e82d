"""A tiny Llama, and the inputs of its layers as torch and transformers see them."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from model import hf, presets
from model.compress import calibrate
from model.compress.registry import Site
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears, parameters
from ops.linear import dense

VOCABULARY, WIDTH = 61, 48
TORCH_NAMES = {
  'attention.query': 'self_attn.q_proj',
  'attention.key': 'self_attn.k_proj',
  'attention.value': 'self_attn.v_proj',
  'attention.output': 'self_attn.o_proj',
  'ffn.gate': 'mlp.gate_proj',
  'ffn.up': 'mlp.up_proj',
  'ffn.down': 'mlp.down_proj',
}


def _tiny(layers=2, seed=0, **changes):
  # Every matrix has two different sides, and none is square.
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=16), ffn=FeedForwardConfig(width=80)
  )
  config = ModelConfig(
    family='llama', vocab_size=VOCABULARY, width=WIDTH, layers=(layer,) * layers, max_positions=64
  )
  model = Transformer(config.replace(**changes), rngs=nnx.Rngs(seed))
  for i, linear in enumerate(linears(model).values()):
    key = jax.random.key(i)
    linear.weight.set_value(0.2 * jax.random.normal(key, linear.weight.shape))
  return model


@pytest.fixture(scope='session')
def tiny():
  """A function that makes a tiny model with random weights."""
  return _tiny


@pytest.fixture(scope='session')
def tiny_of():
  """A function (family, **changes) -> a tiny model with random norms and biases."""
  return _tiny_of


def _tiny_of(family, **changes):
  config = presets.preset(f'tiny-{family}').replace(**changes)
  model, rng = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
  for param in parameters(model).values():
    value, noise = param.get_value(), rng.normal(size=param.get_value().shape)
    param.set_value((value + (0.3 if value.ndim == 1 else 0.08) * noise).astype(value.dtype))
  return model


@pytest.fixture(scope='session')
def logits_of():
  """A function (model, tokens_BT) -> logits."""
  return lambda model, tokens_BT: np.asarray(_run(*nnx.split(model), tokens_BT))


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


@pytest.fixture
def tokens_BT(rng):
  """Calibration rows; the last token of the vocabulary does not occur."""
  return rng.integers(0, VOCABULARY - 1, (6, 10), np.int32)


@pytest.fixture(scope='session')
def site_of():
  """A function (model, tokens_BT, statistics) -> the site of its first block, in batches of 4."""
  return _site


def _site(model, tokens_BT, statistics=()):
  stream = calibrate.Stream(model, calibrate.batches(tokens_BT, 4))
  block = model.layers[0]
  return Site(
    config=model.config,
    layer=block.layer,
    parameters={path: p.get_value() for path, p in parameters(block).items()},
    targets=tuple(linears(block)),
    statistics=stream.observe(block, statistics) if statistics else {},
    errors=functools.partial(stream.errors, block),
    descend=functools.partial(stream.descend, block),
  )


@pytest.fixture
def torch_inputs(tmp_path):
  """A function (model, tokens_BT) -> {layer: inputs [tokens, I]}, by hooks in transformers."""

  def capture(model, tokens_BT):
    folder = tmp_path / 'exported'
    hf.save_pretrained(_densified(model), None, folder)
    other = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = {}
    for i, layer in enumerate(other.model.layers):
      for ours, theirs in TORCH_NAMES.items():
        path = f'layers.{i}.{ours}'
        layer.get_submodule(theirs).register_forward_pre_hook(_note(seen, path))
    with torch.no_grad():
      other(torch.from_numpy(np.asarray(tokens_BT, np.int64)))
    return seen

  return capture


def _note(seen, path):
  def hook(module, inputs):
    seen[path] = inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()

  return hook


def _densified(model):
  plain = nnx.clone(model)
  for param in parameters(plain).values():
    param.set_value(dense(param.get_value()).astype('float32'))
  return plain
