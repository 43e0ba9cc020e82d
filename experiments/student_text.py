"""Lets a student write, for `model.train.on_policy` and to measure it on its own texts."""

import functools
from collections.abc import Sequence

import numpy as np

from model.infer.generate import generate
from model.train.on_policy import OnPolicy, Tokens
from model.transformer import Transformer
from ops.sampling import SamplingConfig


def write(
  model: Transformer,
  prompts: Tokens,
  new_tokens: int,
  seeds: Sequence[int],
  *,
  sampling: SamplingConfig,
) -> list[list[int]]:
  """Continues prompts; a text that ends early carries the end token of the model's config."""
  texts = generate(
    model, prompts, max_new_tokens=new_tokens, sampling_config=sampling, seed=list(seeds)
  )
  end = list(model.config.eos_ids[:1])
  return [text if len(text) == new_tokens else text + end for text in texts]


def on_policy(temperature: float, **settings) -> OnPolicy:
  """The rule by which a student writes batches; `settings` are the other fields of `OnPolicy`."""
  sampling = SamplingConfig(temperature=temperature)
  return OnPolicy(
    write=functools.partial(write, sampling=sampling),
    settings={'temperature': temperature},
    **settings,
  )


def sample(
  model: Transformer, prompts_BT: np.ndarray, new_tokens: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws continuations at temperature 1: tokens [B, T + new_tokens], and which are drawn."""
  prompts = [row.tolist() for row in prompts_BT]
  seeds = [int(s) for s in np.random.default_rng(seed).integers(2**31, size=len(prompts))]
  texts = write(model, prompts, new_tokens, seeds, sampling=SamplingConfig(temperature=1.0))
  length = prompts_BT.shape[1]
  tokens_BT = np.zeros((len(prompts), length + new_tokens), np.int32)
  drawn_BT = np.zeros(tokens_BT.shape, bool)
  tokens_BT[:, :length] = prompts_BT
  for row, text in enumerate(texts):
    tokens_BT[row, length : length + len(text)] = text
    drawn_BT[row, length : length + len(text)] = True
  return tokens_BT, drawn_BT
