"""Linear recurrences over tokens, in chunks: a state of constant size in place of past keys.

  linear  S_t = diag(a_t) S_t-1 + k_t v_t^T                          y_t = S_t^T q_t
  delta   S_t = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T        y_t = S_t^T q_t

The state S of a head is a matrix (H, Z). `linear` has the decay a_t of a head or of each key
channel: linear attention (Katharopoulos et al., 2020, https://arxiv.org/abs/2006.16236; a = 1),
RetNet (Sun et al., 2023, https://arxiv.org/abs/2307.08621) and GLA (Yang et al., 2023,
https://arxiv.org/abs/2312.06635). `delta` is the gated delta rule, which replaces what the state
holds for a key (Yang et al., 2024, https://arxiv.org/abs/2412.06464).

A loop goes over chunks of tokens and carries the state. Within a chunk all tokens are computed at
once, from the scores of its pairs of tokens; the delta rule solves a triangular system for the
values that it really writes (its WY form; Yang et al., 2024, https://arxiv.org/abs/2406.06484).
That costs O(T (CHUNK + H) Z) in time and O(T (H + Z)) in memory, and there is no array [T, T]. The
backward pass runs each chunk again from the state before it. `linear_steps` and `delta_steps` are
the definitions, one token at a time; the tests compare both.

Decays are given as logarithms, finite and at most 0. Only sums of logarithms over a range of tokens
are exponentiated, so nothing overflows, however strong the decay. All sums are in float32.

`starts_BT` marks the tokens before which the state is set to zero: the first ones of documents. A
token with k = 0, a = 1 and, for the delta rule, b = 0 leaves the state as it is.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import axes

CHUNK = 64  # tokens
# The triangular system multiplies errors, and accelerators round factors of products by default.
_exact = functools.partial(jnp.einsum, precision='highest')


def linear(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNZ: jax.Array,
  log_decay_BTN_: jax.Array,
  state_BNHZ: jax.Array | None = None,
  starts_BT: jax.Array | None = None,
  *,
  chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Computes y_t = S_t^T q_t with S_t = diag(a_t) S_t-1 + k_t v_t^T, in chunks.

  `log_decay_BTN_` is log a, [B, T, N, 1] for one decay per head or [B, T, N, H]. The state before
  the first token is zero by default. `chunk` is a power of two. Returns y_BTNZ in the dtype of v,
  and the state after the last token in float32. Raises ValueError for shapes that do not fit.
  """
  _check(q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ, starts_BT)
  tokens = (q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_)
  body = _head_decay if log_decay_BTN_.shape[-1] == 1 else _channel_decay
  return _over_chunks(body, tokens, state_BNHZ, starts_BT, chunk)


def delta(
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNZ: jax.Array,
  log_decay_BTN: jax.Array,
  strength_BTN: jax.Array,
  state_BNHZ: jax.Array | None = None,
  starts_BT: jax.Array | None = None,
  *,
  chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Computes y_t = S_t^T q_t by the gated delta rule, in chunks; keys are to be of length 1.

  `strength_BTN` is b, within 0 and 1. The rest is as in `linear`, with one decay per head.
  """
  axes.check('BTN,BTN', log_decay_BTN, strength_BTN)
  log_decay_BTN_, strength_BTN_ = log_decay_BTN[..., None], strength_BTN[..., None]
  _check(q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ, starts_BT)
  tokens = (q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, strength_BTN_)
  return _over_chunks(_delta, tokens, state_BNHZ, starts_BT, chunk)


def linear_steps(
  q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ=None, starts_BT=None
) -> tuple[jax.Array, jax.Array]:
  """Computes `linear` one token after the other."""
  _check(q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ, starts_BT)

  def step(S_BNHZ, k_BNH, v_BNZ, log_decay_BN_):
    return jnp.exp(log_decay_BN_)[..., None] * S_BNHZ + k_BNH[..., None] * v_BNZ[..., None, :]

  return _steps(step, q_BTNH, (k_BTNH, v_BTNZ, log_decay_BTN_), state_BNHZ, starts_BT)


def delta_steps(
  q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN, strength_BTN, state_BNHZ=None, starts_BT=None
) -> tuple[jax.Array, jax.Array]:
  """Computes `delta` one token after the other."""
  _check(q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN[..., None], state_BNHZ, starts_BT)

  def step(S_BNHZ, k_BNH, v_BNZ, log_decay_BN, strength_BN):
    S_BNHZ = jnp.exp(log_decay_BN)[..., None, None] * S_BNHZ
    held_BNZ = jnp.einsum('BNHZ,BNH->BNZ', S_BNHZ, k_BNH)
    written_BNZ = strength_BN[..., None] * (v_BNZ - held_BNZ)
    return S_BNHZ + k_BNH[..., None] * written_BNZ[..., None, :]

  tokens = (k_BTNH, v_BTNZ, log_decay_BTN, strength_BTN)
  return _steps(step, q_BTNH, tokens, state_BNHZ, starts_BT)


def _check(q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ, starts_BT):
  spec = 'BTNH,BTNH,BTNZ,BTN_,BNHZ,BT'
  sizes = axes.check(spec, q_BTNH, k_BTNH, v_BTNZ, log_decay_BTN_, state_BNHZ, starts_BT)
  if log_decay_BTN_.shape[-1] not in (1, sizes['H']):
    raise ValueError(
      f'decays are those of heads or of the {sizes["H"]} key channels of each, so the last axis of '
      f'their logarithms is 1 or {sizes["H"]}, not {log_decay_BTN_.shape[-1]}'
    )


def _prepared(tokens, state_BNHZ, starts_BT):
  """The tokens and the state in float32, with zeros and no starts where there are none."""
  k_BTNH, v_BTNZ, *_ = tokens
  batch, length, heads, width = k_BTNH.shape
  if state_BNHZ is None:
    state_BNHZ = jnp.zeros((batch, heads, width, v_BTNZ.shape[-1]), jnp.float32)
  if starts_BT is None:
    starts_BT = jnp.zeros((batch, length), bool)
  return tuple(x.astype(jnp.float32) for x in tokens), state_BNHZ.astype(jnp.float32), starts_BT


def _steps(step: Callable, q_BTNH, tokens, state_BNHZ, starts_BT):
  dtype = tokens[1].dtype
  tokens, state_BNHZ, starts_BT = _prepared(tokens, state_BNHZ, starts_BT)

  def body(state_BNHZ, now):
    start_B, q_BNH, *rest = now
    state_BNHZ = step(jnp.where(start_B[:, None, None, None], 0, state_BNHZ), *rest)
    return state_BNHZ, jnp.einsum('BNHZ,BNH->BNZ', state_BNHZ, q_BNH)

  times = tuple(jnp.moveaxis(x, 1, 0) for x in (starts_BT, q_BTNH.astype(jnp.float32), *tokens))
  state_BNHZ, y_TBNZ = jax.lax.scan(body, state_BNHZ, times)
  return jnp.moveaxis(y_TBNZ, 0, 1).astype(dtype), state_BNHZ


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """The sums of the log decays up to each token of a chunk, and its documents.

  Documents are numbered from 0, the one that the state before the chunk belongs to.
  """

  sums_BNT_: jax.Array
  documents_BT: jax.Array

  @property
  def from_before_BNT_(self) -> jax.Array:
    """The decay of the state before the chunk, up to each token; 0 in later documents."""
    same_BT = self.documents_BT == 0
    return jnp.exp(jnp.where(same_BT[:, None, :, None], self.sums_BNT_, -jnp.inf))

  @property
  def to_end_BNT_(self) -> jax.Array:
    """The decay of what each token writes, up to the end of the chunk; 0 of earlier documents."""
    left = self.sums_BNT_[:, :, -1:] - self.sums_BNT_
    same_BT = self.documents_BT == self.documents_BT[:, -1:]
    return jnp.exp(jnp.where(same_BT[:, None, :, None], left, -jnp.inf))

  @property
  def between_BNTS(self) -> jax.Array:
    """The decay from token S to token T of one number per head; 0 where T does not see S."""
    sums_BNT = self.sums_BNT_[..., 0]
    length = sums_BNT.shape[-1]
    seen_BTS = self.documents_BT[:, :, None] == self.documents_BT[:, None, :]
    seen_BTS &= jnp.tri(length, dtype=bool)[None]
    left_BNTS = sums_BNT[..., :, None] - sums_BNT[..., None, :]
    return jnp.exp(jnp.where(seen_BTS[:, None], left_BNTS, -jnp.inf))

  def after(self, state_BNHZ, k_BNTH, written_BNTZ) -> jax.Array:
    """The state after the chunk."""
    kept = jnp.swapaxes(self.from_before_BNT_[:, :, -1:], 2, 3)
    new = jnp.einsum('BNTH,BNTZ->BNHZ', k_BNTH * self.to_end_BNT_, written_BNTZ)
    return kept * state_BNHZ + new


def _over_chunks(body: Callable, tokens, state_BNHZ, starts_BT, chunk: int):
  """Runs `body(chunk, state, *tokens) -> (y, state)` over the chunks of a sequence."""
  if chunk < 1 or chunk & (chunk - 1):
    raise ValueError(f'a chunk is a power of two of tokens, not {chunk}')
  dtype, length = tokens[2].dtype, tokens[2].shape[1]
  q_BTNH, *rest = tokens
  rest, state_BNHZ, starts_BT = _prepared(rest, state_BNHZ, starts_BT)
  tokens = (q_BTNH.astype(jnp.float32), *rest)
  chunk = min(chunk, 1 << (length - 1).bit_length())
  # Zeros are tokens that leave the state as it is.
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
  split = lambda x: rearrange(pad(x), 'B (chunk T) N i -> chunk B N T i', T=chunk)
  starts = rearrange(pad(starts_BT), 'B (chunk T) -> chunk B T', T=chunk)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(state_BNHZ, now):
    starts_BT, *tokens = now
    documents_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    one = _Chunk(jnp.cumsum(tokens[3], axis=2), documents_BT)
    y_BNTZ, state_BNHZ = body(one, state_BNHZ, *tokens)
    return state_BNHZ, y_BNTZ

  state_BNHZ, y = jax.lax.scan(step, state_BNHZ, (starts, *map(split, tokens)))
  y_BTNZ = rearrange(y, 'chunk B N T Z -> B (chunk T) N Z')
  return y_BTNZ[:, :length].astype(dtype), state_BNHZ


def _head_decay(chunk: _Chunk, state_BNHZ, q_BNTH, k_BNTH, v_BNTZ, log_decay):
  del log_decay
  scores_BNTS = jnp.einsum('BNTH,BNSH->BNTS', q_BNTH, k_BNTH) * chunk.between_BNTS
  y_BNTZ = jnp.einsum('BNTH,BNHZ->BNTZ', q_BNTH * chunk.from_before_BNT_, state_BNHZ)
  y_BNTZ += jnp.einsum('BNTS,BNSZ->BNTZ', scores_BNTS, v_BNTZ)
  return y_BNTZ, chunk.after(state_BNHZ, k_BNTH, v_BNTZ)


def _channel_decay(chunk: _Chunk, state_BNHZ, q_BNTH, k_BNTH, v_BNTZ, log_decay):
  """Runs a chunk with a decay per key channel, which no single factor of the scores can express.

  For a token T in the second half of a range and S in the first, the decay is a product: from S to
  the end of the first half, which multiplies the key, and from there to T, which multiplies the
  query. Each half is divided in the same way.
  """
  del log_decay
  y_BNTZ = jnp.einsum('BNTH,BNHZ->BNTZ', q_BNTH * chunk.from_before_BNT_, state_BNHZ)
  y_BNTZ += jnp.sum(q_BNTH * k_BNTH, axis=-1, keepdims=True) * v_BNTZ  # of each token itself
  half, length = 1, q_BNTH.shape[2]
  while half < length:
    y_BNTZ += _of_first_halves(chunk, half, q_BNTH, k_BNTH, v_BNTZ)
    half *= 2
  return y_BNTZ, chunk.after(state_BNHZ, k_BNTH, v_BNTZ)


def _of_first_halves(chunk: _Chunk, half: int, q_BNTH, k_BNTH, v_BNTZ):
  """The values that the second half of each range of 2 * half tokens reads from the first half.

  Returns [B, N, T, Z].
  """
  halves = lambda x: rearrange(x, 'B N (p two T) i -> two B N p T i', two=2, T=half)
  (_, q), (k, _), (v, _) = map(halves, (q_BNTH, k_BNTH, v_BNTZ))
  early, late = halves(chunk.sums_BNT_)
  middle = early[..., -1:, :]
  scores = jnp.einsum('BNpTH,BNpSH->BNpTS', q * jnp.exp(late - middle), k * jnp.exp(middle - early))
  early, late = rearrange(chunk.documents_BT, 'B (p two T) -> two B p T', two=2, T=half)
  same_BpTS = late[..., :, None] == early[..., None, :]
  found = jnp.einsum('BNpTS,BNpSZ->BNpTZ', jnp.where(same_BpTS[:, None], scores, 0), v)
  found = jnp.stack([jnp.zeros_like(found), found])
  return rearrange(found, 'two B N p T Z -> B N (p two T) Z')


def _delta(chunk: _Chunk, state_BNHZ, q_BNTH, k_BNTH, v_BNTZ, log_decay, strength_BNT_):
  """Runs a chunk of the gated delta rule.

  Token t writes u_t = b_t (v_t - h_t), where h_t is the value that the state holds for k_t. That
  state is the one before the chunk plus u_s k_s^T of earlier tokens s, all decayed up to t, so the
  u_t solve a triangular system.
  """
  del log_decay
  decay_BNTS = chunk.between_BNTS
  alike_BNTS = jnp.einsum('BNTH,BNSH->BNTS', k_BNTH, k_BNTH) * decay_BNTS
  held_BNTZ = jnp.einsum('BNTH,BNHZ->BNTZ', k_BNTH * chunk.from_before_BNT_, state_BNHZ)
  written_BNTZ = _solve(strength_BNT_ * alike_BNTS, strength_BNT_ * (v_BNTZ - held_BNTZ))
  scores_BNTS = jnp.einsum('BNTH,BNSH->BNTS', q_BNTH, k_BNTH) * decay_BNTS
  y_BNTZ = jnp.einsum('BNTH,BNHZ->BNTZ', q_BNTH * chunk.from_before_BNT_, state_BNHZ)
  y_BNTZ += jnp.einsum('BNTS,BNSZ->BNTZ', scores_BNTS, written_BNTZ)
  return y_BNTZ, chunk.after(state_BNHZ, k_BNTH, written_BNTZ)


@jax.custom_vjp
def _solve(lower_BNTS: jax.Array, y_BNTZ: jax.Array) -> jax.Array:
  """Returns x where (I + the part of `lower` below its diagonal) x = y."""
  return _solve_forward(lower_BNTS, y_BNTZ)[0]


def _solve_forward(lower_BNTS, y_BNTZ):
  inverse_BNTS = _inverse(lower_BNTS)
  x_BNTZ = _exact('BNTS,BNSZ->BNTZ', inverse_BNTS, y_BNTZ)
  return x_BNTZ, (inverse_BNTS, x_BNTZ)


def _solve_backward(kept, x_bar_BNTZ):
  inverse_BNTS, x_BNTZ = kept
  y_bar_BNTZ = _exact('BNTS,BNTZ->BNSZ', inverse_BNTS, x_bar_BNTZ)
  return jnp.tril(-_exact('BNTZ,BNSZ->BNTS', y_bar_BNTZ, x_BNTZ), -1), y_bar_BNTZ


_solve.defvjp(_solve_forward, _solve_backward)


def _inverse(lower_BNTS: jax.Array) -> jax.Array:
  """The inverse of I + the part below the diagonal, from inverses of diagonal blocks that double.

  [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']]. These are products that every platform
  is fast at; a triangular solver runs row by row, on CPUs in another library with its own threads.
  """
  batch, heads, length = lower_BNTS.shape[:3]
  inverse = jnp.ones((batch, heads, length, 1, 1), lower_BNTS.dtype)
  half = 1
  while half < length:
    split = 'B N (p row T) (q column S) -> row column B N p T q S'
    blocks = rearrange(lower_BNTS, split, row=2, T=half, column=2, S=half)
    below = jnp.einsum('BNpTpS->BNpTS', blocks[1, 0])
    first, second = inverse[:, :, ::2], inverse[:, :, 1::2]
    below = -_exact('BNpTi,BNpio,BNpoS->BNpTS', second, below, first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    inverse = jnp.concatenate([upper, jnp.concatenate([below, second], -1)], -2)
    half *= 2
  return inverse[:, :, 0]
