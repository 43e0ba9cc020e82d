"""`/v1/completions`: continues texts or tokens."""

import asyncio
from collections.abc import Sequence

from experiments.serving import settings as common
from experiments.serving.body import Fields
from experiments.serving.call import Call, Form
from experiments.serving.choice import Choice, Piece, Scored
from experiments.serving.errors import invalid
from experiments.serving.grammars import grammar
from experiments.serving.served import Served
from experiments.serving.words import Words

DEFAULT_TOKENS = 16


async def prepare(fields: Fields, served: Served) -> Call:
  """Reads a call. Raises ApiError where something is wrong."""
  model, adapter = served.model(fields)
  own = common.settings(fields, adapter, served)
  fields.only('suffix', '')
  fields.only('best_of', own.n, why=f'must be the same as n, {own.n}')
  echo, logprobs = fields.flag('echo'), common.logprobs_within(fields, 'logprobs')
  least = 0 if echo else 1
  most = common.limit(fields, ['max_tokens'], DEFAULT_TOKENS, least)
  prompts = await _prompts(fields, served)
  limits = [common.new_tokens(prompt, most, served.capacity, least) for prompt in prompts]
  requests = own.requests(
    prompts,
    limits,
    await grammar(fields, served),
    logprobs=logprobs,
    # Without a token to draw, the engine still reads the prompt where its scores are asked for.
    prompt_logprobs=(logprobs or 0) if echo and (logprobs is not None or most == 0) else None,
  )
  choices = [
    Choice(i, r, served.tokenizer, own.text(served.tokenizer, r.prompt), echo=echo)
    for i, r in enumerate(requests)
  ]
  form = form_of(served.words, scored=logprobs is not None)
  return Call(model=model, settings=own, choices=tuple(choices), form=form)


async def _prompts(fields: Fields, served: Served) -> list[list[int]]:
  prompt = fields.values.get('prompt')
  if isinstance(prompt, str):
    texts = [prompt]
  elif isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
    texts = prompt
  else:
    return _tokens(fields, prompt, served.vocab_size)
  if len(texts) > common.MOST_CHOICES:
    raise invalid('prompt', f'a call has at most {common.MOST_CHOICES} prompts, not {len(texts)}')
  special = fields.flag('add_special_tokens', True)
  encode = served.tokenizer.prompt if special else served.tokenizer.encode
  for text in texts:
    served.check_text(fields.checked('prompt', text))
  prompts = await asyncio.to_thread(lambda: [encode(text) for text in texts])
  if not all(prompts):
    raise invalid('prompt', 'the prompt is empty; give it some text')
  served.check_tokens(prompts)
  return prompts


def _tokens(fields, prompt, vocab_size) -> list[list[int]]:
  prompts = prompt if isinstance(prompt, list) and prompt else [prompt]
  prompts = prompts if all(isinstance(p, list) for p in prompts) else [prompts]
  for one in prompts:
    if not one or not all(common.is_token(token, vocab_size) for token in one):
      tokens = f'tokens from 0 to {vocab_size - 1}'
      raise fields.wrong('prompt', f'a text, a list of texts, a list of {tokens}, or lists of them')
  return prompts


def form_of(words: Words, *, scored: bool) -> Form:
  """The form of completions; `scored`: with log-probabilities."""

  def entry(choice: Choice, piece: Piece) -> dict:
    return {
      'index': choice.index,
      'text': piece.text,
      'logprobs': _logprobs(words, piece.scored) if scored else None,
      'finish_reason': piece.finish,
      'stop_reason': piece.stop,
    }

  return Form(
    prefix='cmpl',
    whole_object='text_completion',
    part_object='text_completion',
    opening=None,
    part=entry,
    whole=entry,
  )


def _logprobs(words: Words, scores: Sequence[Scored]) -> dict:
  return {
    'tokens': [words.text(score.token) for score in scores],
    'token_logprobs': [score.logprob for score in scores],
    'top_logprobs': [_top(words, score) for score in scores],
    'text_offset': [score.offset for score in scores],
  }


def _top(words: Words, score: Scored) -> dict[str, float] | None:
  if score.logprob is None:
    return None
  top = {}
  for token, logprob in (*score.likeliest, (score.token, score.logprob)):
    top.setdefault(words.text(token), logprob)
  return top
