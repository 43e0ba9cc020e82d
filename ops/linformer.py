"""Attention to summaries of keys: Linformer as published, and a causal form of it.

Wang et al. (2020), "Linformer", https://arxiv.org/abs/2006.04768: the S keys and values of a text
are replaced by R sums of them, with learned weights, so the cost is O(T R) and not O(T S). Every
sum has all tokens in it, so no mask can hide the future: `published` is for texts that are known
as a whole.

The causal form cuts the text into chunks and sums within each. A query sees the R sums of every
chunk before its own, and the tokens of a window that reaches back to the start of its chunk, in one
softmax. So do the authors of Transformer-LS (Zhu et al., 2021, https://arxiv.org/abs/2107.02192),
whose weights depend on the tokens:

  static    sum_t E[t, r] k_t with learned E [chunk, R], and another one for values (Linformer)
  dynamic   sum_t softmax_t(z[t, r]) k_t over the chunk, with z from the tokens (Transformer-LS)

Differs from Transformer-LS: keys are summed after their rotation; layers of queries and keys may
have an RMS norm, and sums have no norm of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from ops import attention, axes, blocked
from ops.masks import AttentionMask

LOWEST = -1e30  # the peak of no logits


def published(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  keys_SR: jax.Array,
  values_SR: jax.Array,
  lengths_B: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Linformer's attention, in which every token sees all others: y_BTNH.

  `keys_SR` and `values_SR` are the weights of the sums. Tokens from lengths_B[b] on are padding and
  take no part in them.
  """
  sizes = axes.check(
    'BTNH,BSKH,BSKH,SR,SR,B', q_BTNH, k_BSKH, v_BSKH, keys_SR, values_SR, lengths_B
  )
  real_BS = jnp.arange(sizes['S'])[None] < lengths_B[:, None]
  sums = lambda x, w: jnp.einsum('BSKH,BS,SR->BRKH', x, real_BS.astype(x.dtype), w.astype(x.dtype))
  everywhere = lambda length: jnp.zeros((sizes['B'], length), jnp.int32)
  mask = AttentionMask(everywhere(sizes['T']), everywhere(sizes['R']))  # equal positions: all seen
  return attention.attention(
    q_BTNH, sums(k_BSKH, keys_SR), sums(v_BSKH, values_SR), mask, scale=scale
  )


@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums over the tokens of P chunks, R of each, as far as the tokens have come.

  A summary is the sum divided by its total. In the dynamic form both are relative to exp(peak); in
  the static form peaks and totals are 0, which stands for no division.
  """

  k_BPRKH: jax.Array
  v_BPRKH: jax.Array
  peak_BPR: jax.Array
  total_BPR: jax.Array

  def summaries(self) -> tuple[jax.Array, jax.Array]:
    """The summaries of keys and of values, each [B, P R, K, H]."""
    total = jnp.where(self.total_BPR == 0, 1.0, self.total_BPR)[..., None, None]
    flat = lambda x: rearrange(x / total, 'B P R K H -> B (P R) K H')
    return flat(self.k_BPRKH), flat(self.v_BPRKH)


jax.tree_util.register_dataclass(Sums, [f.name for f in dataclasses.fields(Sums)], [])


def static_sums(k_BPSKH, v_BPSKH, real_BPS, keys_SR, values_SR) -> Sums:
  """Sums over the S tokens of each chunk, by weights that depend on the place in the chunk alone.

  Tokens that are not real count as nothing.
  """
  add = lambda x, w: jnp.einsum(
    'BPSKH,BPS,SR->BPRKH', x.astype(jnp.float32), real_BPS.astype(jnp.float32), w
  )
  k_BPRKH = add(k_BPSKH, keys_SR)
  zeros = jnp.zeros(k_BPRKH.shape[:3])
  return Sums(k_BPRKH, add(v_BPSKH, values_SR), zeros, zeros)


def dynamic_sums(k_BPSKH, v_BPSKH, real_BPS, logits_BPSR) -> Sums:
  """Sums over the S tokens of each chunk, by the exponentials of logits."""
  logits_BPSR = jnp.where(real_BPS[..., None], logits_BPSR.astype(jnp.float32), LOWEST)
  peak_BPR = jax.lax.stop_gradient(logits_BPSR.max(2))
  weights_BPSR = jnp.exp(logits_BPSR - peak_BPR[:, :, None]) * real_BPS[..., None]
  add = lambda x: jnp.einsum('BPSKH,BPSR->BPRKH', x.astype(jnp.float32), weights_BPSR)
  return Sums(add(k_BPSKH), add(v_BPSKH), peak_BPR, weights_BPSR.sum(2))


def joined(a: Sums, b: Sums) -> Sums:
  """The sums over the tokens of both, chunk by chunk."""
  peak_BPR = jnp.maximum(a.peak_BPR, b.peak_BPR)
  shares = [jnp.exp(one.peak_BPR - peak_BPR) for one in (a, b)]
  wide = [share[..., None, None] for share in shares]
  return Sums(
    wide[0] * a.k_BPRKH + wide[1] * b.k_BPRKH,
    wide[0] * a.v_BPRKH + wide[1] * b.v_BPRKH,
    peak_BPR,
    shares[0] * a.total_BPR + shares[1] * b.total_BPR,
  )


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: AttentionMask,
  sums: Sums,
  chunk: int,
  sinks_N: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
) -> jax.Array:
  """One softmax over keys by their mask and over the summaries of all chunks before the query's.

  The sums are those of chunk 0 and the following; a query sees chunk j from position
  (j + 1) chunk on. Returns y_BTNH.
  """
  scores = {'scale': scale, 'softcap': softcap}
  near = blocked.partial(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, **scores)
  batch, chunks, ranks = sums.peak_BPR.shape
  seen_from = (jnp.arange(chunks * ranks, dtype=jnp.int32) // ranks + 1) * chunk
  far_mask = AttentionMask(
    mask.q_positions_BT, jnp.broadcast_to(seen_from[None], (batch, chunks * ranks))
  )
  summaries = (x.astype(q_BTNH.dtype) for x in sums.summaries())
  far = blocked.partial(q_BTNH, *summaries, far_mask, None, **scores)
  return blocked.merged([near, far])[0]
