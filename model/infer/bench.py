"""Prefill and decode of one model as callables without arguments, ready to be timed.

Both are compiled ahead of time for one batch and one prompt length, and own their cache.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model import kv_cache
from model.infer import generate
from model.infer.prepare import prepare as prepare_weights
from model.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """`prefill()` runs the prompts, `decode()` the next `steps` tokens of every row."""

  prefill: Callable[[], jax.Array]
  decode: Callable[[], jax.Array]
  batch: int
  prompt_length: int
  steps: int
  decode_peak_bytes: int  # arguments, outputs and temporaries that the decode program needs


def prepare(
  model: Transformer, *, batch: int = 1, prompt_length: int = 128, steps: int = 16, seed: int = 0
) -> Bench:
  """Packs the weights for the platform, and compiles both programs for random prompts."""
  program = generate.Program.of(prepare_weights(model))
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, model.config.vocab_size, (batch, prompt_length), np.int32)
  lengths_B = np.full(batch, prompt_length, np.int32)
  cache = kv_cache.init(model.config, batch, prompt_length + steps, model.dtype)
  prefill = generate.lower_prefill(program, tokens_BT, lengths_B, cache).compile()
  start = (jnp.zeros(batch, jnp.int32), jnp.asarray(lengths_B), cache, jax.random.key(seed))
  decode = generate.lower_decode(program, *start).compile()
  memory = decode.memory_analysis()
  held = {'cache': cache}

  def run_prefill():
    logits_BV, held['cache'] = prefill(program.leaves, tokens_BT, lengths_B, held['cache'])
    return logits_BV

  def run_decode():
    tokens_B, positions_B, key = jnp.zeros(batch, jnp.int32), jnp.asarray(lengths_B), start[3]
    key = jax.random.clone(key)
    for _ in range(steps):
      tokens_B, positions_B, held['cache'], key = decode(
        program.leaves, tokens_B, positions_B, held['cache'], key
      )
    return tokens_B

  return Bench(
    prefill=run_prefill,
    decode=run_decode,
    batch=batch,
    prompt_length=prompt_length,
    steps=steps,
    decode_peak_bytes=(
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    ),
  )
