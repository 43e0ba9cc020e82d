"""The analytic cost of a model: parameters, FLOPs per token, bytes stored and bytes read.

A product of x[I] with w[I, O] counts 2 I O FLOPs in every weight format, multiplied zeros included.
Of the experts, only those that a token chooses count. Attention counts its two products over the
keys that a query may see: (T + 1) / 2 keys per query in a causal prefill of T tokens, about half of
the dense square, and only the keys inside a window. Norms, rotations, softmax and activations are
left out; they are below 1 % in a model of any size. After Kaplan et al., "Scaling Laws for Neural
Language Models" (2020, https://arxiv.org/abs/2001.08361), section 2.1, which leaves out the
embedding lookup too.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from model import kv_cache, transformer, units
from model.cache_spec import CacheSpec
from model.config import ModelConfig
from model.eval.records import Metric
from ops.linear import Matrix

EMBEDDING = 'embedding.table'
LOOKED_UP = (EMBEDDING, 'positions.table')  # one row per token is read, not the table
VOCABULARY = (*LOOKED_UP, 'head.weight', 'head.bias')
BF16_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
  """Parameter counts as in papers and model cards: a tied head counts once."""

  total: int
  non_embedding: int  # without embedding, learned positions and head
  active: int  # of the total, those that one token meets: of the experts only the chosen ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """FLOPs per token: matrices of the layers, attention over the keys, and the head."""

  linear: float
  attention: float
  head: float

  @property
  def total(self) -> float:
    return self.linear + self.attention + self.head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
  """The logical elements of some matrices, and the bytes that are stored for them."""

  elements: int
  nbytes: int

  @property
  def vs_bf16(self) -> float:
    return self.nbytes / (self.elements * BF16_BYTES)

  @property
  def bits_per_weight(self) -> float:
    return 8 * self.nbytes / self.elements


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
  """Path -> logical shape of every parameter of the dense model."""
  params = transformer.parameters(transformer.abstract(config))
  return {path: tuple(param.get_value().shape) for path, param in params.items()}


@functools.lru_cache(maxsize=16)
def axis_letters(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
  """Path -> letters of the axes of every parameter of the dense model."""
  return units.letters(transformer.abstract(config))


def parameters(config: ModelConfig) -> Parameters:
  """Counts the parameters of the dense model."""
  sizes = {path: math.prod(shape) for path, shape in parameter_shapes(config).items()}
  vocabulary = sum(sizes.get(path, 0) for path in VOCABULARY)
  total = sum(sizes.values())
  active = sum(round(share(config, path) * size) for path, size in sizes.items())
  return Parameters(total=total, non_embedding=total - vocabulary, active=active)


def share(config: ModelConfig, path: str) -> float:
  """The part of a parameter that one token meets: below 1 for the weights of experts."""
  letters = axis_letters(config)[path]
  # Of one axis is the bias of a router, which all tokens meet.
  if letters[0] != 'E' or len(letters) == 1:
    return 1.0
  return config.layers[units.layer_of(path)].ffn.active_share


def prefill_flops_per_token(config: ModelConfig, length: int) -> Flops:
  """FLOPs per token, averaged over a causal prefill of `length` tokens with the head on each."""
  _positive('the prefill length', length)
  return _flops(config, sum(layer.mixer.prefill_flops(length) for layer in config.layers))


def decode_flops_per_token(config: ModelConfig, context: int) -> Flops:
  """FLOPs of the token at position `context` - 1: it sees `context` keys, its own included."""
  _positive('the context', context)
  return _flops(config, sum(layer.mixer.decode_flops(context) for layer in config.layers))


def training_flops_per_token(
  config: ModelConfig, length: int, *, adapter_parameters: int | None = None
) -> float:
  """FLOPs per token of the forward and the backward pass over rows of `length` tokens.

  The backward pass of a product is two products of its size: the gradients of both factors. Without
  `adapter_parameters` all matrices are trained. With them, only the adapters are, and the gradients
  of the other matrices are not needed. What is computed a second time (rematerialization, the
  logits of a chunk) does not count, and neither does the optimizer.
  """
  forward = prefill_flops_per_token(config, length)
  if adapter_parameters is None:
    return 3 * forward.total
  return 2 * (forward.linear + forward.head) + 3 * forward.attention + 6 * adapter_parameters


def kv_bytes_per_token(config: ModelConfig, dtype=jnp.bfloat16) -> int:
  """Bytes per token of a dense key/value cache, all layers together."""
  return sum(layer.mixer.cached for layer in config.layers) * jnp.dtype(dtype).itemsize


def kv_cache_bytes(
  config: ModelConfig, context: int, dtype=jnp.bfloat16, cache_format: CacheSpec | str = 'float'
) -> int:
  """Bytes of the keys and values that a token sees at this context, at most a window of them.

  The scales of a format, and the tokens that it keeps exact in `dtype`, are counted as allocated.
  """
  _positive('the context', context)
  return sum(_cache_bytes(config, context, dtype, cache_format))


def _cache_bytes(config, context, dtype, cache_format) -> list[int]:
  """Bytes that each layer holds of a row."""

  def held(i, layer):
    slots = layer.mixer.seen(context)
    make = lambda: kv_cache.of_layer(config, i, 1, slots, dtype, cache_format)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))

  return [held(i, layer) for i, layer in enumerate(config.layers)]


def touched(config: ModelConfig, path: str, rows: int) -> float:
  """The part of a parameter that a decode step of `rows` rows reads.

  For experts it is the mean over random choices, 1 - (1 - share) ** rows: two rows seldom choose
  the same experts, so decoding a batch soon reads all of them.
  """
  _positive('the number of rows', rows)
  return 1 - (1 - share(config, path)) ** rows


def decode_bytes_per_step(
  config: ModelConfig,
  weights: Mapping[str, Matrix],
  context: int,
  cache_dtype=jnp.bfloat16,
  cache_format: CacheSpec | str = 'float',
  batch: int = 1,
) -> int:
  """Bytes that one decode step of `batch` sequences must read: weights as stored, and the caches.

  `weights` has every parameter of the model under its path. One row of a lookup table is read for
  each sequence; a tied embedding is read whole, because it is also the head. For experts see
  `touched`.
  """
  _positive('the context', context)
  held = _cache_bytes(config, context, cache_dtype, cache_format)
  # What several layers share is read by each of them.
  read = batch * sum(held[i - layer.mixer.back] for i, layer in enumerate(config.layers))
  for path, w in weights.items():
    lookup = path in LOOKED_UP and not (path == EMBEDDING and config.tied)
    if lookup:
      read += batch * (w.nbytes // w.shape[0])
    else:
      read += round(touched(config, path, batch) * w.nbytes)
  return read


def decode_bytes_per_token(
  config: ModelConfig,
  weights: Mapping[str, Matrix],
  context: int,
  cache_dtype=jnp.bfloat16,
  cache_format: CacheSpec | str = 'float',
) -> int:
  """Bytes that one decode step of one sequence must read; see `decode_bytes_per_step`."""
  return decode_bytes_per_step(config, weights, context, cache_dtype, cache_format)


def storage(weights: Mapping[str, Matrix]) -> Storage:
  """Elements and stored bytes of these matrices, with scales and indices."""
  if not weights:
    raise ValueError('there are no weights to measure')
  return Storage(
    elements=sum(math.prod(w.shape) for w in weights.values()),
    nbytes=sum(w.nbytes for w in weights.values()),
  )


def storage_metrics(
  linears: Mapping[str, Matrix], weights: Mapping[str, Matrix]
) -> dict[str, Metric]:
  """The size metrics of a record: of the `linears` (path -> matrix), and of all `weights`."""
  linear = storage(linears)
  return {
    'linear_bytes': Metric(linear.nbytes, 'byte', len(linears)),
    'linear_bytes_vs_bf16': Metric(linear.vs_bf16, '1', len(linears)),
    'bits_per_weight': Metric(linear.bits_per_weight, 'bit', len(linears)),
    'stored_bytes': Metric(storage(weights).nbytes, 'byte', len(weights)),
  }


def _flops(config: ModelConfig, attention: float) -> Flops:
  matrices = sum(
    share(config, path) * math.prod(shape)
    for path, shape in parameter_shapes(config).items()
    if path.startswith('layers.') and path.endswith('.weight')
  )
  return Flops(linear=2 * matrices, attention=attention, head=2 * config.width * config.vocab_size)


def _positive(what: str, value: int) -> None:
  if value < 1:
    raise ValueError(f'{what} must be at least 1, not {value}')
