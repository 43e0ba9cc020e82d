"""Answers a file of prompts through the engine: many at once, in order, and resumable.

A line of the prompts is {"prompt": TEXT} or {"messages": [...]}, and may have settings of its own:
max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
frequency_penalty, seed. A line of the answers is {"index", "text", "tokens", "finish"}, in the
order of the prompts, written when those before it are. A run that was ended goes on after the
answers that are there; `OUT.run.json` says what they were made with.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from model.infer.engine import Engine
from model.infer.request import Request
from model.tokenizer import Tokenizer
from ops.sampling import SamplingConfig

SAMPLING = {field.name for field in dataclasses.fields(SamplingConfig)} - {'logit_bias'}
OWN = SAMPLING | {'max_new_tokens', 'seed'}
AHEAD = 2  # prompts that wait for each slot, so that none is ever free


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a file of prompts. Raises ValueError naming the first line that is none."""
  found = []
  for number, line in enumerate(path.read_text('utf-8').split('\n'), 1):
    if not line.strip():
      continue
    try:
      one = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}, line {number}: no JSON: {error}') from None
    problem = _problem(one)
    if problem is not None:
      raise ValueError(f'{path}, line {number}: {problem}')
    found.append(one)
  return found


def _problem(one) -> str | None:
  if not isinstance(one, dict) or ('prompt' in one) == ('messages' in one):
    return 'a line is an object with either "prompt" or "messages"'
  if not isinstance(one.get('prompt', ''), str) or one.get('prompt') == '':
    return '"prompt" is a text that is not empty'
  unknown = set(one) - OWN - {'prompt', 'messages'}
  if unknown:
    return f'unknown key {min(unknown)!r}; there are {", ".join(sorted(OWN))}'
  return None


def request(
  one: Mapping[str, Any],
  tokenizer: Tokenizer,
  *,
  max_new_tokens: int,
  sampling: SamplingConfig,
  seed: int,
) -> Request:
  """The request of a line, whose own settings come before the given ones."""
  own = {key: one[key] for key in SAMPLING & set(one)}
  text = one.get('prompt')
  if text is None:
    prompt = tokenizer.encode(tokenizer.apply_chat_template(one['messages']))
  else:
    prompt = tokenizer.prompt(text)
  try:
    return Request(
      prompt=prompt,
      max_new_tokens=one.get('max_new_tokens', max_new_tokens),
      sampling=dataclasses.replace(sampling, **own),
      seed=one.get('seed', seed),
    )
  except TypeError as error:
    raise ValueError(f'a setting of {dict(one)} has a wrong type: {error}') from None


def answers(
  engine: Engine, requests: Iterable[Request], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
  """The answers to requests, in their order, a few of them ahead of those given out."""
  left, tokens, done = enumerate(requests), {}, {}
  prompts, index_of, next_index, more = {}, {}, 0, True
  while more or index_of:
    while more and len(index_of) < (1 + AHEAD) * engine.slots:
      index, one = next(left, (None, None))
      more = index is not None
      if more:
        index_of[engine.add(one)], prompts[index], tokens[index] = index, one.prompt, []
    for progress in engine.step():
      index = index_of[progress.request]
      tokens[index].extend(progress.tokens)
      if progress.finish is not None:
        done[index] = progress.finish
        del index_of[progress.request]
    while next_index in done:
      new = tokens.pop(next_index)
      yield {
        'index': next_index,
        'text': tokenizer.continuation(prompts.pop(next_index), new),
        'tokens': len(new),
        'finish': done.pop(next_index),
      }
      next_index += 1


def write(
  out: pathlib.Path,
  made_with: Mapping[str, Any],
  requests: list[Request],
  answer: Callable[[list[Request]], Iterator[dict[str, Any]]],
) -> int:
  """Writes the answers that are missing, a line each, and returns how many there were already.

  Raises ValueError if the answers that are there were made in another way.
  """
  described = {**made_with, 'prompts': _fingerprint(requests)}
  note = out.with_name(out.name + '.run.json')
  there = _whole_lines(out)
  if there and (not note.is_file() or json.loads(note.read_text()) != described):
    raise ValueError(
      f'{out} has answers of another model, other prompts or other settings; name another --out, '
      'or delete it'
    )
  note.write_text(json.dumps(described, indent=1) + '\n')
  with out.open('r+' if out.exists() else 'w', encoding='utf-8') as file:
    # What a killed run has written of a line goes.
    file.seek(sum(len(line.encode()) for line in there))
    file.truncate()
    for one in answer(requests[len(there) :]):
      file.write(json.dumps({**one, 'index': one['index'] + len(there)}, ensure_ascii=False) + '\n')
      file.flush()
  return len(there)


def _whole_lines(out: pathlib.Path) -> list[str]:
  text = out.read_bytes().decode('utf-8', 'ignore') if out.exists() else ''
  return [line + '\n' for line in text.split('\n')[:-1]]


def _fingerprint(requests: list[Request]) -> str:
  return hashlib.sha256(repr(requests).encode()).hexdigest()
