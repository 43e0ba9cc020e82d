"""Tiny checkpoints whose matrices lie on random grids, and what the readers must make of them."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import save_file

from model import hf, transformer
from ops.linear import dense

SIZES = {
  'vocab_size': 99,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'pad_token_id': None,
}
TOKENS = np.random.default_rng(1).integers(0, 99, (2, 7))
# Both compute in float32 and add in different orders; logits are of order 1.
LOGIT_TOLERANCE = 1e-5
# Our layers, and which part of theirs each is, with the sizes of all parts.
LLAMA = {
  'attention.query': 'self_attn.q_proj',
  'attention.key': 'self_attn.k_proj',
  'attention.value': 'self_attn.v_proj',
  'attention.output': 'self_attn.o_proj',
  'ffn.gate': 'mlp.gate_proj',
  'ffn.up': 'mlp.up_proj',
  'ffn.down': 'mlp.down_proj',
}
PHI3 = {
  'attention.query': ('self_attn.qkv_proj', 0, 64),
  'attention.key': ('self_attn.qkv_proj', 64, 96),
  'attention.value': ('self_attn.qkv_proj', 96, 128),
  'attention.output': 'self_attn.o_proj',
  'ffn.gate': ('mlp.gate_up_proj', 0, 96),
  'ffn.up': ('mlp.gate_up_proj', 96, 192),
  'ffn.down': 'mlp.down_proj',
}
FAMILIES = {
  'llama': (transformers.LlamaConfig, LLAMA),
  'phi3': (transformers.Phi3Config, PHI3),
}


class Checkpoint:
  """A plain model of transformers, and what a method stores in place of its matrices."""

  def __init__(self, family: str):
    make, self.parts = FAMILIES[family]
    self.config = make(**SIZES, attn_implementation='eager')
    self.theirs = transformers.AutoModelForCausalLM.from_config(self.config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
      for parameter in self.theirs.parameters():
        parameter.copy_(torch.tensor(0.3 * rng.standard_normal(parameter.shape)))
    state = self.theirs.state_dict().items()
    self.state = {name: tensor.numpy().copy() for name, tensor in state}

  def layers(self) -> list[str]:
    """The names X of the matrices in the blocks."""
    return [
      name.removesuffix('.weight')
      for name in self.state
      if '.layers.' in name and 'norm' not in name
    ]

  def stored(self, encode, **options):
    """Random matrices as a method stores them: its tensors, and the matrices [O, I] by name.

    `encode(rng, outputs, inputs, **options)` returns the parts of one by the ends of their names,
    and what they stand for.
    """
    rng, tensors, wide = np.random.default_rng(2), {}, {}
    for layer in self.layers():
      own, wide[layer] = encode(rng, *self.state[f'{layer}.weight'].shape, **options)
      tensors |= {f'{layer}.{leaf}': np.ascontiguousarray(array) for leaf, array in own.items()}
    return tensors, wide

  def write(self, folder, about, tensors):
    """Writes a folder with some tensors in place of the matrices."""
    dropped = {f'{layer}.weight' for layer in self.layers()}
    plain = {name: array for name, array in self.state.items() if name not in dropped}
    save_file({**plain, **tensors}, folder / 'model.safetensors', {'format': 'pt'})
    config = {**self.config.to_dict(), 'quantization_config': about}
    if about is None:
      del config['quantization_config']
    (folder / 'config.json').write_text(json.dumps(config))

  def check_weights(self, folder, wide: dict[str, np.ndarray]) -> dict:
    """Compares the matrices of the loaded model with `wide` [O, I] by bits, and returns them."""
    said = []
    model, _ = hf.load_pretrained(folder, say=said.append)
    found = {path: p.get_value() for path, p in transformer.parameters(model).items()}
    weights = {}
    for l in range(SIZES['num_hidden_layers']):
      for ours, theirs in self.parts.items():
        name, low, high = (theirs, None, None) if isinstance(theirs, str) else theirs
        own = weights[f'{l}.{ours}'] = found[f'layers.{l}.{ours}.weight']
        expected = wide[f'model.layers.{l}.{name}'][low:high]
        np.testing.assert_array_equal(np.asarray(dense(own)).T, expected, err_msg=ours)
    return types.SimpleNamespace(model=model, weights=weights, said=said)

  def check_logits(self, model, wide: dict[str, np.ndarray]):
    """Compares the logits with those of transformers' model that has the matrices `wide`."""
    matrices = {f'{name}.weight': torch.tensor(w) for name, w in wide.items()}
    self.theirs.load_state_dict(matrices, strict=False)
    with torch.no_grad():
      expected = self.theirs(torch.tensor(TOKENS)).logits.numpy()
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t))(state, jnp.asarray(TOKENS, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)


@pytest.fixture(scope='session')
def checkpoints():
  """A checkpoint of each family."""
  return {family: Checkpoint(family) for family in FAMILIES}
