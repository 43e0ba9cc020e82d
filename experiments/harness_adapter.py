"""A model as `lm-evaluation-harness` calls one: texts in, log-likelihoods and continuations out.

The only file that imports `lm_eval` (extra `harness`). Texts become tokens, and long ones are cut,
as the harness does for transformers' models. Log-likelihoods are those of `model.eval.likelihood`;
continuations come from the engine that serves requests, which reads shared beginnings once too.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from experiments import common
from model.eval import likelihood, pairs
from model.infer.engine import Engine
from model.infer.prepare import prepare
from model.infer.request import Request
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from ops.sampling import SamplingConfig

MAX_NEW_TOKENS = 256  # where a task does not say it
COUNTS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How a model is asked.

  max_length: tokens that it reads at most; None: its positions.
  tokens: how many a call holds at once.
  slots: continuations that are made at once.
  seed: of those that are drawn.
  widened: weights are multiplied in floating point, not by the fast products of this device.
  """

  max_length: int | None = None
  tokens: int = likelihood.TOKENS
  slots: int = 8
  seed: int = 0
  widened: bool = False


class LissomLM(LM):
  """A model of ours for `lm_eval.simple_evaluate(model=...)`."""

  def __init__(
    self, model: Transformer, tokenizer: Tokenizer, settings: Settings = Settings(), name: str = ''
  ):
    super().__init__()
    self.model, self.tokenizer, self.settings, self.name = model, tokenizer, settings, name
    self.max_length = settings.max_length or model.config.max_positions

  @functools.cached_property
  def ready(self) -> Transformer:
    """The model, packed for this device, unless its weights are to be widened."""
    return self.model if self.settings.widened else prepare(self.model)

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    asked = [one.args for one in requests]
    found = self._score([pairs.request(self.tokenizer, *pair) for pair in asked])
    answers = [(one.log_prob, one.greedy) for one in found]
    for pair, answer in zip(asked, answers, strict=True):
      self.cache_hook.add_partial('loglikelihood', pair, answer)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
    before = pairs.prefix_id(self.tokenizer)
    tokens = [pairs.encode(self.tokenizer, one.args[0]) for one in requests]
    windows = [pairs.windows(one, before, self.max_length) for one in tokens]
    scores = iter(self._score([window for own in windows for window in own]))
    answers = [sum(next(scores).log_prob for _ in own) for own in windows]
    for one, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', one.args, answer)
    return answers

  def generate_until(self, requests: list[Instance]) -> list[str]:
    jobs = [self._job(*one.args) for one in requests]
    if not jobs:
      return []
    needed = max(len(one.prompt) + one.max_new_tokens for one, _ in jobs)
    engine = Engine(self.ready, slots=self.settings.slots, capacity=max(needed, 2))
    answers = self._answers(engine, jobs)
    for one, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial('generate_until', one.args, answer)
    return answers

  @property
  def tokenizer_name(self) -> str:
    return self.name.replace('/', '__')

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return self.tokenizer.chat_template if chat_template else None

  def _score(self, requests: Sequence[likelihood.Request]) -> list[likelihood.Score]:
    return likelihood.score(
      self.ready,
      requests,
      max_length=self.max_length,
      tokens=self.settings.tokens,
      progress=common.labelled('log-likelihoods'),
    )

  def _job(self, context: str, options: Mapping[str, Any]) -> tuple[Request, tuple[str, ...]]:
    """What is asked for, and the texts that end it."""
    count = next((options[key] for key in COUNTS if options.get(key) is not None), MAX_NEW_TOKENS)
    if not 0 < count < self.max_length:
      raise ValueError(
        f'a task asks for {count} new tokens, but the model reads {self.max_length}; give it '
        'max_gen_toks, or --max_length'
      )
    stops = options.get('until') or []
    prompt = pairs.encode(self.tokenizer, context) or [pairs.prefix_id(self.tokenizer)]
    request = Request(
      prompt=tuple(prompt[-(self.max_length - count) :]),
      max_new_tokens=count,
      sampling=_sampling(options),
      seed=self.settings.seed,
      stop_ids=frozenset(self.tokenizer.eos_ids[:1]),
    )
    return request, tuple(filter(None, [stops] if isinstance(stops, str) else stops))

  def _answers(self, engine: Engine, jobs) -> list[str]:
    """Continuations up to their stop texts; what comes after one is not waited for."""
    job_of = {engine.add(request): i for i, (request, _) in enumerate(jobs)}
    tokens, texts = [[] for _ in jobs], [''] * len(jobs)
    while engine.busy:
      for progress in engine.step():
        i = job_of[progress.request]
        tokens[i].extend(progress.tokens)
        # The harness decodes what is new alone, so that its first token may lose a space.
        text = self.tokenizer.decode(tokens[i], skip_special=True)
        texts[i] = _cut(text, jobs[i][1])
        if len(texts[i]) < len(text):
          engine.cancel(progress.request)
    return texts


def _cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of any stop text."""
  ends = [at for at in map(text.find, stops) if at >= 0]
  return text[: min(ends, default=len(text))]


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
  """Greedy, unless a task wants draws and says a temperature."""
  temperature = float(options.get('temperature') or 0.0)
  if options.get('do_sample') is False or temperature == 0.0:
    return SamplingConfig()
  known = {key: options[key] for key in ('top_k', 'top_p', 'min_p') if options.get(key)}
  return SamplingConfig(temperature=temperature, **known)
