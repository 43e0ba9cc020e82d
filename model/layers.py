"""Defines the parts of a decoder block as NNX modules.

Every matrix is the `weight` of a `Linear`, has the shape (I, O), and is multiplied only by
`ops.linear.matmul` or `matmuls`, so that any `Weight` can take its place. `axes` names the axes of
a module's parameter by the letters of `ops.axes`: `model.sharding` maps those of matrices to mesh
axes, and `model.units` finds what is removed together with a channel or a head.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from model.config import LayerConfig, ModelConfig
from model.kv_cache import KVCache
from ops import norms, rope
from ops.attention import attention
from ops.linear import matmul, matmuls
from ops.masks import AttentionMask

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu': jax.nn.relu,
}
INIT_STDDEV = 0.02


class Linear(nnx.Module):
  """x[..., I] @ weight[I, O] (+ bias[O])."""

  def __init__(self, shape, *, axes: tuple[str, str], bias: bool, rngs, dtype, stddev=INIT_STDDEV):
    self.weight = nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype))
    self.bias = nnx.Param(jnp.zeros(shape[-1], dtype)) if bias else None
    self.axes = axes

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.add_bias(matmul(x, self.weight.get_value()))

  def add_bias(self, y: jax.Array) -> jax.Array:
    if self.bias is None:
      return y
    bias_O = self.bias.get_value().astype(y.dtype)
    return y + jnp.broadcast_to(bias_O, y.shape)


def apply(x: jax.Array, *linears: Linear) -> tuple[jax.Array, ...]:
  """Applies several linear layers to the same input, so that their products can share work."""
  products = matmuls(x, [linear.weight.get_value() for linear in linears])
  return tuple(linear.add_bias(y) for linear, y in zip(linears, products))


class Norm(nnx.Module):
  """RMS norm or layer norm over the last axis, with the family's epsilon and offset."""

  def __init__(
    self, width: int, config: ModelConfig, *, dtype, kind: str | None = None, axes=('D',)
  ):
    self.kind, self.axes = kind or config.norm, axes
    self.eps, self.offset = config.norm_eps, config.norm_offset
    self.scale = nnx.Param(jnp.full(width, 1 - self.offset, dtype))
    self.bias = nnx.Param(jnp.zeros(width, dtype)) if self.kind == 'layer' else None

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.bias is None:
      return norms.rms_norm(x, self.scale.get_value(), eps=self.eps, offset=self.offset)
    return norms.layer_norm(x, self.scale.get_value(), self.bias.get_value(), eps=self.eps)


class Table(nnx.Module):
  """A table of vectors that are looked up by index: token or position embeddings."""

  def __init__(self, rows: int, width: int, *, axes: tuple[str, str], rngs, dtype):
    self.table = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), (rows, width), dtype))
    self.axes = axes

  def __call__(self, index: jax.Array) -> jax.Array:
    return self.table.get_value()[index]


class Attention(nnx.Module):
  """Multi-head attention with grouped key/value heads and an optional key/value cache."""

  def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs, dtype):
    self.layer = layer
    width, queries = config.width, layer.query_heads * layer.head_width
    keys = layer.kv_heads * layer.head_width
    make = lambda shape, axes, bias, **kw: Linear(
      shape, axes=axes, bias=bias, rngs=rngs, dtype=dtype, **kw
    )
    self.query = make((width, queries), ('D', 'N'), layer.qkv_bias)
    self.key = make((width, keys), ('D', 'K'), layer.qkv_bias)
    self.value = make((width, keys), ('D', 'K'), layer.qkv_bias)
    self.output = make(
      (queries, width), ('N', 'D'), layer.output_bias, stddev=_residual_stddev(config)
    )
    norm = lambda: Norm(layer.head_width, config, dtype=dtype, kind='rms', axes=('H',))
    self.query_norm = norm() if layer.qk_norm else None
    self.key_norm = norm() if layer.qk_norm else None

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: KVCache | None = None):
    """Returns (y_BTD, cache). `angles` is (cos, sin) or None."""
    heads = lambda x: rearrange(x, 'B T (heads H) -> B T heads H', H=self.layer.head_width)
    q_BTNH, k_BTKH, v_BTKH = map(heads, apply(x_BTD, self.query, self.key, self.value))
    if self.query_norm is not None:
      q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
    if angles is not None:
      q_BTNH, k_BTKH = rope.rotate(q_BTNH, *angles), rope.rotate(k_BTKH, *angles)
    if cache is not None:
      cache, k_BTKH, v_BTKH = cache.update(k_BTKH, v_BTKH, mask.q_positions_BT)
    scale = self.layer.query_scale or self.layer.head_width**-0.5
    softcap = self.layer.attention_softcap
    y_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, scale=scale, softcap=softcap)
    return self.output(rearrange(y_BTNH, 'B T N H -> B T (N H)')), cache


class FeedForward(nnx.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) in families without a gate."""

  def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs, dtype):
    self.activation = layer.activation
    make = lambda shape, axes, **kw: Linear(
      shape, axes=axes, bias=layer.mlp_bias, rngs=rngs, dtype=dtype, **kw
    )
    wide = (config.width, layer.ffn_width)
    self.gate = make(wide, ('D', 'F')) if layer.gated else None
    self.up = make(wide, ('D', 'F'))
    self.down = make(wide[::-1], ('F', 'D'), stddev=_residual_stddev(config))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    act = ACTIVATIONS[self.activation]
    if self.gate is None:
      return self.down(act(self.up(x_BTD)))
    gate_BTF, up_BTF = apply(x_BTD, self.gate, self.up)
    return self.down(act(gate_BTF) * up_BTF)


class Block(nnx.Module):
  """One decoder layer: attention and feed-forward with residual connections."""

  def __init__(self, config: ModelConfig, layer: LayerConfig, *, rngs, dtype):
    self.layer = layer
    norm = lambda: Norm(config.width, config, dtype=dtype)
    self.attention_norm = norm()
    self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
    self.attention_post_norm = norm() if layer.post_norms else None
    self.ffn_norm = norm()
    self.ffn = FeedForward(config, layer, rngs=rngs, dtype=dtype)
    self.ffn_post_norm = norm() if layer.post_norms else None

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: KVCache | None = None):
    """Returns (x_BTD, cache)."""
    post = lambda norm, y: y if norm is None else norm(y)
    y_BTD, cache = self.attention(self.attention_norm(x_BTD), angles, mask, cache)
    attended_BTD = x_BTD + post(self.attention_post_norm, y_BTD)
    source_BTD = x_BTD if self.layer.parallel else attended_BTD
    z_BTD = self.ffn(self.ffn_norm(source_BTD))
    return attended_BTD + post(self.ffn_post_norm, z_BTD), cache


def _residual_stddev(config: ModelConfig) -> float:
  # GPT-2's initialisation keeps the variance of the residual stream independent of the depth.
  return INIT_STDDEV / (2 * len(config.layers)) ** 0.5
