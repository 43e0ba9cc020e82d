"""Batched generation: one compiled prefill, then a compiled loop of decode steps, over one cache.

A row gives the same tokens in any batch as alone. Prompts are padded on the right; slot s of the
cache holds position s of its row, and a query sees no slot past its own position. The random key of
a draw follows from the row's own seed and the position of the token. Only rounding may differ: a
product over more rows may add in another order, which decides only between tokens with nearly equal
logits. Lengths are rounded up to buckets, so few shapes are ever compiled.

The parameters are passed as a flat tuple of leaves, because walking a module in Python takes longer
than the computation of a token in many models. One call decodes several tokens, because passing a
few hundred arrays takes a tenth of that time. The cache is donated and written in place.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import kv_cache, sharding
from model.cache_spec import CacheSpec
from model.infer.prepare import prepare
from model.transformer import Transformer
from ops import sampling
from ops.sampling import GREEDY, Sampling, SamplingConfig

PROMPT_BUCKET = 32
CACHE_BUCKET = 128
TOKENS_PER_CALL = 8
GREEDY_CONFIG = SamplingConfig()
BURST_S = 0.05  # streamed tokens come together if they take no longer than this


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
  """A model without its leaves; one object per structure, because jit hashes it at each call."""

  graphdef: nnx.GraphDef
  treedef: jax.tree_util.PyTreeDef

  def model(self, leaves) -> Transformer:
    """The model with these leaves."""
    return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


_structure = functools.cache(Structure)


@dataclasses.dataclass(frozen=True)
class Program:
  """A model ready to run: its structure and its leaves."""

  static: Structure
  leaves: tuple[jax.Array, ...]

  @classmethod
  def of(cls, model: Transformer) -> 'Program':
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    return cls(_structure(graphdef, treedef), tuple(leaves))

  def prefill(self, tokens_BT, lengths_B, cache):
    """Runs the prompts: (logits_BV after each row's last token, cache). Donates the cache."""
    return _prefill(self.static, self.leaves, tokens_BT, lengths_B, cache)

  def decode(self, tokens_B, positions_B, cache, count, sampled: Sampling = GREEDY, keys_B=None):
    """Runs `count` tokens per row, each chosen after those before it.

    `keys_B` are the keys of the rows' seeds; greedy settings need none. Returns (tokens_B,
    positions_B, cache, new_TB): the last tokens, and all new ones, of which the first `count` of
    `TOKENS_PER_CALL` steps are filled. Donates tokens, positions and cache.
    """
    return _decode(self.static, self.leaves, tokens_B, positions_B, cache, count, sampled, keys_B)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(static, leaves, tokens_BT, lengths_B, cache):
  model = static.model(leaves)
  # Padding stays at the last position of its row, so that a row knows its own length.
  positions_BT = jnp.minimum(jnp.arange(tokens_BT.shape[1])[None], lengths_B[:, None] - 1)
  x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
  x_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
  return model.logits(x_BD), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3, 4))
def _decode(static, leaves, tokens_B, positions_B, cache, count, sampled, keys_B):
  def step(i, carry):
    tokens_B, positions_B, cache, new_TB = carry
    # Without the barrier, XLA moves what does not change out of the loop: whole widened matrices.
    held, tokens_B = jax.lax.optimization_barrier((leaves, tokens_B))
    model = static.model(held)
    x_BTD, cache = model.hidden(tokens_B[:, None], positions_BT=positions_B[:, None], cache=cache)
    positions_B = positions_B + 1
    tokens_B = _choose(model.logits(x_BTD[:, 0]), positions_B, sampled, keys_B)
    return tokens_B, positions_B, cache, new_TB.at[i].set(tokens_B)

  new_TB = jnp.zeros((TOKENS_PER_CALL, len(tokens_B)), jnp.int32)
  return jax.lax.fori_loop(0, count, step, (tokens_B, positions_B, cache, new_TB))


@jax.jit
def _choose(logits_BV, positions_B, sampled, keys_B):
  """Chooses the tokens at these positions."""
  if keys_B is not None:
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
  return sampling.sample(logits_BV, sampled, keys_B)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _forward(static, leaves, tokens_BT, cache):
  model, batch = static.model(leaves), len(tokens_BT)
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], (batch, tokens_BT.shape[1]))
  x_BTD, cache = model.hidden(tokens_BT, positions_BT=positions_BT, cache=cache)
  return model.logits(x_BTD), cache


def forward(program: Program, tokens_BT, cache):
  """Runs prompts of one length: (logits_BTV after every token, cache). Donates the cache."""
  return _forward(program.static, program.leaves, tokens_BT, cache)


def lower_prefill(program: Program, tokens_BT, lengths_B, cache) -> jax.stages.Lowered:
  """Lowers the prefill; once compiled, it is called without the program's static part."""
  return _prefill.lower(program.static, program.leaves, tokens_BT, lengths_B, cache)


def lower_decode(program: Program, tokens_B, positions_B, cache) -> jax.stages.Lowered:
  """Lowers the greedy decode loop; once compiled, it is called without the program's static part.

  The compiled program's arguments are those of `_decode` from the leaves to the number of tokens,
  an int32 up to `TOKENS_PER_CALL`, and then `GREEDY, None`.
  """
  arguments = (program.leaves, tokens_B, positions_B, cache, np.int32(1), GREEDY, None)
  return _decode.lower(program.static, *arguments)


def generate(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling_config: SamplingConfig | Sequence[SamplingConfig] = GREEDY_CONFIG,
  seed: int | Sequence[int] = 0,
  on_tokens: Callable[[np.ndarray], None] | None = None,
  cache_format: CacheSpec | str = 'float',
) -> list[list[int]]:
  """Continues each prompt until an end token of the config or `max_new_tokens`.

  `sampling_config` and `seed` are for all rows, or one for each. One seed for all rows draws the
  same continuation for equal prompts; seeds for each row draw different ones. `on_tokens` receives
  each step's tokens, int32 [B], to stream them; some steps come together where they are short.
  Returns the new tokens of each prompt without the end token. `cache_format` is how keys and values
  are kept. The weights are packed for the platform first; to continue many prompts with one model,
  pass the result of `prepare`, which is not packed again.

  Raises:
    ValueError: no such cache format, an empty prompt, a token outside the vocabulary, more
      positions than the model has learned, settings or seeds for another number of rows, or
      settings that depend on the tokens before, which `model.infer.engine` remembers.
  """
  kv_cache.check_format(cache_format)
  _check(model, prompts, max_new_tokens)
  configs = _a_row_each(sampling_config, SamplingConfig, len(prompts), 'sampling settings')
  seeds = _a_row_each(seed, int | np.integer, len(prompts), 'seeds')
  if max_new_tokens == 0:
    return [[] for _ in prompts]
  if any(config.remembers for config in configs):
    raise ValueError('penalties and biases of logits need model.infer.engine.Engine')
  drawn = any(config.temperature > 0 for config in configs)
  program, sampled = Program.of(prepare(model)), sampling.settings(configs) if drawn else GREEDY
  keys_B = None if sampled is GREEDY else jnp.stack([jax.random.key(int(seed)) for seed in seeds])
  tokens_BT, lengths_B = pad(prompts)
  needed = max(tokens_BT.shape[1], int(lengths_B.max()) + max_new_tokens)
  capacity = _bucket(needed, CACHE_BUCKET)
  mesh = sharding.mesh_of(model)
  cache = kv_cache.init(model.config, len(prompts), capacity, model.dtype, cache_format, mesh=mesh)
  logits_BV, cache = program.prefill(tokens_BT, lengths_B, cache)
  positions_B, count = jnp.asarray(lengths_B), 1
  tokens_B = _choose(logits_BV, positions_B, sampled, keys_B)
  output = _Output(max_new_tokens, model.config.eos_ids, on_tokens)
  output.take(np.asarray(tokens_B)[None])
  while not output.done:
    start = time.perf_counter()
    tokens_B, positions_B, cache, new_TB = program.decode(
      tokens_B, positions_B, cache, np.int32(count), sampled, keys_B
    )
    output.take(np.asarray(new_TB)[:count])
    step_s = (time.perf_counter() - start) / count
    longest = TOKENS_PER_CALL if on_tokens is None else int(BURST_S / step_s)
    count = min(max(longest, 1), TOKENS_PER_CALL, max(output.left, 1))
  return output.rows()


class _Output:
  """The tokens so far, and whether all rows have ended."""

  def __init__(self, max_new_tokens, eos_ids, on_tokens):
    self.left, self.eos_ids, self.on_tokens = max_new_tokens, eos_ids, on_tokens
    self.steps, self.ended_B, self.done = [], False, False

  def take(self, new_TB):
    """Takes steps up to the last one that is wanted."""
    for tokens_B in new_TB:
      if self.done:
        return
      self.steps.append(tokens_B)
      self.left -= 1
      if self.on_tokens is not None:
        self.on_tokens(tokens_B)
      self.ended_B |= np.isin(tokens_B, self.eos_ids)
      self.done = self.left == 0 or bool(self.ended_B.all())

  def rows(self) -> list[list[int]]:
    return _cut(np.stack(self.steps, 1), self.eos_ids)


def _a_row_each(value, kind, rows: int, what: str) -> list:
  values = [value] * rows if isinstance(value, kind) else list(value)
  if len(values) != rows:
    raise ValueError(f'there are {rows} prompts, but {len(values)} {what}')
  return values


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Prompts padded on the right to a bucket: (tokens_BT int32, lengths_B int32)."""
  lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
  tokens_BT = np.zeros((len(prompts), _bucket(int(lengths_B.max()), PROMPT_BUCKET)), np.int32)
  for row, prompt in zip(tokens_BT, prompts):
    row[: len(prompt)] = prompt
  return tokens_BT, lengths_B


def _bucket(length: int, step: int) -> int:
  # Multiples up to eight steps, then powers of two: at most half a bucket is wasted.
  if length <= 8 * step:
    return -(-length // step) * step
  return 1 << (length - 1).bit_length()


def _cut(tokens_BT, eos_ids) -> list[list[int]]:
  rows = []
  for row in tokens_BT:
    ends = np.flatnonzero(np.isin(row, eos_ids))
    rows.append(row[: ends[0] if len(ends) else len(row)].tolist())
  return rows


def _check(model, prompts, max_new_tokens):
  if not prompts or any(len(prompt) == 0 for prompt in prompts):
    raise ValueError('a prompt has at least one token')
  if max_new_tokens < 0:
    raise ValueError(f'the number of new tokens cannot be negative, as {max_new_tokens} is')
  vocabulary = model.config.vocab_size
  for prompt in prompts:
    bad = [token for token in prompt if not 0 <= token < vocabulary]
    if bad:
      raise ValueError(f'token {bad[0]} is outside the vocabulary of {vocabulary}')
  longest = max(map(len, prompts)) + max_new_tokens
  if model.positions is not None and longest > model.config.max_positions:
    raise ValueError(
      f'{longest} positions are needed, but the model has learned {model.config.max_positions}'
    )
