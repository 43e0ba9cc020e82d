"""What recurrent mixers share: their cache, documents, and the norm and gate of their heads."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import cache
from model.layers.basic import Buffer, StreamConfig
from model.layers.cache import Cache
from ops import axes, norms
from ops.masks import AttentionMask


@cache.register
@dataclasses.dataclass(frozen=True)
class StateCache(Cache):
  """The state of each head, in float32 whatever the format; it does not grow with the text.

  A row continues from its length, and a call whose first position is 0 begins it anew. It cannot be
  set back to a position in between, because the state before a token is not kept: to return to a
  position, keep the cache of that moment.
  """

  state_BNHZ: jax.Array = cache.array('BNHZ')

  @property
  def capacity(self):
    return None


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where documents begin among the tokens of a call, and which tokens are no padding.

  None stands for no document, or for no padding.
  """

  starts_BT: jax.Array | None
  real_BT: jax.Array | None

  @classmethod
  def of(cls, mask: AttentionMask, cached: bool) -> 'Tokens':
    """Reads both from a mask, in which the tokens of a segment stand together.

    Without a cache, padding changes nothing, because it comes after all tokens of its row.
    """
    if cached:
      positions_BT = mask.q_positions_BT
      first_B1 = positions_BT[:, :1] == 0
      rest = ((0, 0), (0, positions_BT.shape[1] - 1))
      return cls(jnp.pad(first_B1, rest), cache.is_token(positions_BT))
    if mask.q_segments_BT is None:
      return cls(None, None)
    changes_BT = mask.q_segments_BT[:, 1:] != mask.q_segments_BT[:, :-1]
    return cls(jnp.pad(changes_BT, ((0, 0), (1, 0))), None)

  def only(self, x: jax.Array) -> jax.Array:
    """The array [B, T, ...] with zeros in the places of padding."""
    if self.real_BT is None:
      return x
    return jnp.where(self.real_BT.reshape(*self.real_BT.shape, *(1,) * (x.ndim - 2)), x, 0)


class HeadNorm(nnx.Module):
  """An RMS norm of each head, whose scale all heads share, times the swish of a gate."""

  axes = ('Z',)

  def __init__(self, width: int, stream: StreamConfig, *, dtype):
    self.eps = stream.norm_eps
    self.scale = nnx.Param(jnp.ones(width, dtype))

  def __call__(self, y_BTNZ: jax.Array, gate_BTNZ: jax.Array) -> jax.Array:
    axes.check('BTNZ,BTNZ', y_BTNZ, gate_BTNZ)
    normed_BTNZ = norms.rms_norm(y_BTNZ.astype(jnp.float32), self.scale.get_value(), eps=self.eps)
    gated_BTNZ = normed_BTNZ * jax.nn.silu(gate_BTNZ.astype(jnp.float32))
    return gated_BTNZ.astype(gate_BTNZ.dtype)


class Decays(nnx.Module):
  """A decay of each head that is not trained, as its logarithm."""

  axes = ('Y',)

  def __init__(self, log_decay_N: jax.Array):
    self.log_decay = Buffer(log_decay_N.astype(jnp.float32))
