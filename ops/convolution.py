"""A short causal convolution of each channel over tokens, as recurrent mixers have it.

  y_t = sum over i < width of kernel_i * x_t-width+1+i

Inputs of other documents and before the first token are zero, unless `before` has the last ones of
an earlier call. It costs `width` multiplications per number, in shifted copies that XLA fuses.
"""

import jax
import jax.numpy as jnp

from ops import axes


def causal(
  x_BTO: jax.Array,
  kernel__O: jax.Array,
  before_B_O: jax.Array | None = None,
  starts_BT: jax.Array | None = None,
) -> jax.Array:
  """Convolves each channel with its own kernel [width, O] over the tokens so far: y_BTO.

  before_B_O: the width - 1 inputs before the first; zeros by default.
  starts_BT: marks the first tokens of documents, which see none before them.
  Computes in float32 and returns the dtype of x. Raises ValueError for shapes that do not fit.
  """
  sizes = axes.check('BTO,_O,B_O,BT', x_BTO, kernel__O, before_B_O, starts_BT)
  width, length = len(kernel__O), sizes['T']
  if before_B_O is None:
    before_B_O = jnp.zeros((sizes['B'], width - 1, sizes['O']), x_BTO.dtype)
  elif before_B_O.shape[1] != width - 1:
    raise ValueError(
      f'a kernel over {width} tokens needs {width - 1} inputs before them, not '
      f'{before_B_O.shape[1]}'
    )
  all_B_O = jnp.concatenate([before_B_O, x_BTO], 1, dtype=jnp.float32)
  documents_B_ = None
  if starts_BT is not None:
    documents_B_ = jnp.pad(jnp.cumsum(starts_BT, 1, dtype=jnp.int32), ((0, 0), (width - 1, 0)))
  y_BTO = jnp.zeros((), jnp.float32)
  for i in range(width):
    now = slice(i, i + length)
    seen_BTO = all_B_O[:, now]
    if documents_B_ is not None:
      same_BT = documents_B_[:, now] == documents_B_[:, width - 1 :]
      seen_BTO = jnp.where(same_BT[..., None], seen_BTO, 0)
    y_BTO = y_BTO + seen_BTO * kernel__O[i].astype(jnp.float32)[None, None]
  return y_BTO.astype(x_BTO.dtype)
