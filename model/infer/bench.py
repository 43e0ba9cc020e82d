"""Compiles the prefill and the decoding of one model into callables that can be timed.

They are compiled for one batch size and one prompt length, take no arguments, and share one cache.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model import kv_cache
from model.cache_spec import CacheSpec
from model.compiled import peak_bytes
from model.infer import generate
from model.infer.prepare import prepare as prepare_weights
from model.transformer import Transformer
from ops.sampling import GREEDY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """The compiled phases of one model.

  prefill: runs the prompts and computes the logits of the last token of each row.
  forward: as prefill, with the logits of all tokens.
  decode: generates the next `steps` tokens of every row.
  stream: as decode, but Python reads the tokens of each call before the next, as in generation.
  """

  prefill: Callable[[], jax.Array]
  forward: Callable[[], jax.Array]
  decode: Callable[[], jax.Array]
  stream: Callable[[], jax.Array]
  batch: int
  prompt_length: int
  steps: int
  cache_bytes: int  # of the keys and values of all rows, as stored
  prefill_peak_bytes: int  # arguments, outputs and temporaries of the prefill program
  decode_peak_bytes: int  # of the decode program


def prepare(
  model: Transformer,
  *,
  batch: int = 1,
  prompt_length: int = 128,
  steps: int = 16,
  seed: int = 0,
  cache_format: CacheSpec | str = 'float',
) -> Bench:
  """Packs the weights for the platform, and compiles all phases for random prompts."""
  program = generate.Program.of(prepare_weights(model))
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, model.config.vocab_size, (batch, prompt_length), np.int32)
  lengths_B = np.full(batch, prompt_length, np.int32)
  cache = kv_cache.init(model.config, batch, prompt_length + steps, model.dtype, cache_format)
  prefill = generate.lower_prefill(program, tokens_BT, lengths_B, cache).compile()
  start = (jnp.zeros(batch, jnp.int32), jnp.asarray(lengths_B), cache)
  decode = generate.lower_decode(program, *start).compile()
  held = {'cache': cache}

  def run_prefill():
    logits_BV, held['cache'] = prefill(program.leaves, tokens_BT, lengths_B, held['cache'])
    return logits_BV

  def run_forward():
    logits_BTV, held['cache'] = generate.forward(program, tokens_BT, held['cache'])
    return logits_BTV

  def run_decode(after_call=lambda new_TB: None):
    tokens_B, positions_B = jnp.zeros(batch, jnp.int32), jnp.asarray(lengths_B)
    for done in range(0, steps, generate.TOKENS_PER_CALL):
      count = np.int32(min(generate.TOKENS_PER_CALL, steps - done))
      tokens_B, positions_B, held['cache'], new_TB = decode(
        program.leaves, tokens_B, positions_B, held['cache'], count, GREEDY, None
      )
      after_call(new_TB)
    return tokens_B

  return Bench(
    prefill=run_prefill,
    forward=run_forward,
    decode=run_decode,
    stream=functools.partial(run_decode, np.asarray),
    batch=batch,
    prompt_length=prompt_length,
    steps=steps,
    cache_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(cache)),
    prefill_peak_bytes=peak_bytes(prefill),
    decode_peak_bytes=peak_bytes(decode),
  )
