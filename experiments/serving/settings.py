"""The fields that completions and chats have in common, as requests to the engine."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from experiments.serving.body import Fields, shown
from experiments.serving.errors import invalid
from experiments.serving.served import Served
from model.infer.grammar import Grammar
from model.infer.request import MOST_LOGPROBS, Request
from model.infer.stops import StoppedText
from model.tokenizer import Tokenizer
from ops.sampling import SamplingConfig

MOST_CHOICES = 128  # of one call, over all of its prompts
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_BIASES = 1024
COLDEST = 1e-4  # below it, the likeliest token is as good as certain; a quotient may overflow
LEAST_TOP_P = 1e-6
SEEDS = 2**63
# Fields that would change the answer and that this server does not know, with what changes nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
  'allowed_token_ids': ([],),
  'bad_words': ([],),
  'beam_width': (1,),
  'length_penalty': (1, 1.0),
  'logits_processors': ([],),
  'min_tokens': (0,),
  'priority': (0,),
  'prompt_embeds': (),
  'prompt_logprobs': (),
  'repetition_detection': (),
  'skip_special_tokens': (True,),
  'spaces_between_special_tokens': (True,),
  'truncate_prompt_tokens': (),
  'typical_p': (1, 1.0),
  'use_beam_search': (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How each prompt of a call is to be continued."""

  n: int
  sampling: SamplingConfig
  seed: int
  stops: tuple[str, ...]
  stop_ids: frozenset[int]
  included: bool
  ignore_eos: bool
  stream: bool
  include_usage: bool
  continuous_usage: bool
  adapter: str | None

  def text(
    self, tokenizer: Tokenizer, prompt: Sequence[int], *, special: bool = False
  ) -> StoppedText:
    """The text that continues a prompt; `special`: with the names of special tokens."""
    given = {'included': self.included, 'special': special}
    return StoppedText(tokenizer, prompt, self.stops, **given)

  def requests(
    self,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    grammar: Grammar | None = None,
    **logprobs: int | None,
  ) -> list[Request]:
    """`n` requests per prompt, in order; choice i draws by the seed + i."""
    if len(prompts) * self.n > MOST_CHOICES:
      raise invalid('n', f'a call has at most {MOST_CHOICES} choices, not {len(prompts) * self.n}')
    if grammar is not None and self.ignore_eos:
      raise invalid('ignore_eos', 'ignore_eos must be false where a grammar says when a text ends')
    try:
      return [
        Request(
          prompt=tuple(prompt),
          max_new_tokens=limit,
          sampling=self.sampling,
          seed=(self.seed + i) % SEEDS,
          stop_ids=self.stop_ids,
          ignore_eos=self.ignore_eos,
          guide=None if grammar is None else grammar.guide(),
          adapter=self.adapter,
          **logprobs,
        )
        for prompt, limit in zip(prompts, limits, strict=True)
        for i in range(self.n)
      ]
    except ValueError as error:
      raise invalid(None, str(error)) from None


def settings(fields: Fields, adapter: str | None, served: Served) -> Settings:
  """Reads the fields that both endpoints have. Raises ApiError where one is wrong."""
  for field, neutral in REFUSED.items():
    fields.only(field, *neutral)
  options = fields.inner('stream_options')
  stream = fields.flag('stream')
  if options is not None and not stream:
    raise invalid('stream_options', 'stream_options needs "stream": true')
  vocab_size, ignore_eos = served.vocab_size, fields.flag('ignore_eos')
  ends = () if ignore_eos else served.vocabulary.eos_ids
  seed = fields.integer('seed', None, -SEEDS, SEEDS - 1)
  return Settings(
    n=fields.integer('n', 1, 1, MOST_CHOICES),
    sampling=_sampling(fields, vocab_size),
    seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
    stops=_stops(fields),
    stop_ids=frozenset((*ends, *_tokens(fields, 'stop_token_ids', vocab_size))),
    included=fields.flag('include_stop_str_in_output'),
    ignore_eos=ignore_eos,
    stream=stream,
    include_usage=options is not None and options.flag('include_usage'),
    continuous_usage=options is not None and options.flag('continuous_usage_stats'),
    adapter=adapter,
  )


def _sampling(fields, vocab_size) -> SamplingConfig:
  temperature = fields.number('temperature', 1.0, 0, 100)
  top_k = fields.integer('top_k', None, -1, 2**31 - 1)
  top_p = fields.number('top_p', None, 0, 1)
  return SamplingConfig(
    temperature=temperature if temperature >= COLDEST else 0.0,
    top_k=top_k if top_k and top_k > 0 else None,
    top_p=None if top_p is None else max(top_p, LEAST_TOP_P),
    min_p=fields.number('min_p', None, 0, 1),
    repetition_penalty=fields.number('repetition_penalty', 1.0, 0.01, 100),
    presence_penalty=fields.number('presence_penalty', 0.0, -2, 2),
    frequency_penalty=fields.number('frequency_penalty', 0.0, -2, 2),
    logit_bias=_biases(fields, vocab_size),
  )


def _biases(fields, vocab_size) -> tuple[tuple[int, float], ...]:
  biases = fields.inner('logit_bias')
  if biases is None:
    return ()
  if len(biases.values) > MOST_BIASES:
    raise invalid('logit_bias', f'logit_bias has at most {MOST_BIASES} tokens')
  found = {}
  for name in biases.values:
    if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size):
      must = f'tokens of the vocabulary, from 0 to {vocab_size - 1}'
      raise invalid('logit_bias', f'the keys of logit_bias must be {must}, not {shown(name)}')
    found[int(name)] = biases.number(name, 0.0, -100, 100)
  return tuple(sorted(found.items()))


def _stops(fields) -> tuple[str, ...]:
  stop = fields.values.get('stop')
  stops = [stop] if isinstance(stop, str) else stop or []
  right = isinstance(stops, list) and len(stops) <= MOST_STOPS
  if not right or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
    size = f'of 1 to {LONGEST_STOP} characters'
    raise fields.wrong('stop', f'a text or a list of at most {MOST_STOPS} texts, each {size}')
  return tuple(fields.checked('stop', s) for s in stops)


def _tokens(fields, field, vocab_size) -> list[int]:
  tokens = fields.list(field) or []
  if not all(is_token(token, vocab_size) for token in tokens):
    raise fields.wrong(field, f'a list of tokens from 0 to {vocab_size - 1}')
  return tokens


def is_token(value: Any, vocab_size: int) -> bool:
  return type(value) is int and 0 <= value < vocab_size


def limit(fields: Fields, names: Sequence[str], default: int | None, least: int) -> int | None:
  """The first of the fields that is given: the most new tokens."""
  for name in names:
    if fields.has(name):
      return fields.integer(name, None, least, 2**31 - 1)
  return default


def new_tokens(prompt: Sequence[int], most: int | None, capacity: int, least: int) -> int:
  """The most new tokens for this prompt. Raises ApiError if the context cannot hold them."""
  left = capacity - len(prompt)
  needed = least if most is None else most
  if left < needed:
    raise invalid(
      'prompt',
      f'the prompt has {len(prompt)} tokens and {needed} new ones are asked for, but the context '
      f'has {capacity} here; shorten the prompt or ask for fewer',
      code='context_length_exceeded',
    )
  return left if most is None else most


def logprobs_within(fields: Fields, field: str) -> int | None:
  """The number of alternatives beside each token, or None."""
  return fields.integer(field, None, 0, MOST_LOGPROBS)
