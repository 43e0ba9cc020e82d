"""Hidden states of whole windows, computed as in generation: through the key/value cache.

A window is processed in pieces of `PIECE` tokens, so that queries read the keys and values that the
format has stored. One pass over the whole window would not measure a format that keeps the tokens
of the present call exact. A piece is a page of 'int4': a query then sees what it sees in decoding
token by token, its own page exactly and earlier pages as they are stored. The results of the other
formats do not depend on the length of a piece, where all tokens stay. Under a policy that gives
tokens up, a piece sees itself and what was kept of the pieces before it, and its tokens choose.

The cost is that of a prefill that reads the whole cache for each piece.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from model import kv_cache
from model.cache_spec import CacheSpec
from model.layers.mixers.paged import PAGE
from model.transformer import Transformer

PIECE = PAGE


def hidden(
  model: Transformer, tokens_BT: jax.Array, cache_format: CacheSpec | str, piece: int = PIECE
) -> jax.Array:
  """Returns the normalised last hidden states x_BTD, every row a document from position 0 on."""
  batch, length = tokens_BT.shape
  count = -(-length // piece)
  padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, count * piece - length)))
  # Padding repeats the last position, as the cache requires.
  positions_BT = jnp.minimum(jnp.arange(count * piece, dtype=jnp.int32), length - 1)[None]
  positions_BT = jnp.broadcast_to(positions_BT, padded_BT.shape)
  cache = kv_cache.init(model.config, batch, count * piece, model.dtype, cache_format)

  def feed(cache, piece_of):
    tokens_BT, positions_BT = piece_of
    x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
    return cache, x_BTD

  pieces = tuple(
    rearrange(a, 'B (piece T) -> piece B T', T=piece) for a in (padded_BT, positions_BT)
  )
  _, hidden = jax.lax.scan(feed, cache, pieces)
  return rearrange(hidden, 'piece B T D -> B (piece T) D')[:, :length]
