"""Tells whether two models share a tokenizer, and how long the vocabulary is that they share.

Distributions over tokens can be compared only if the same id means the same token. The widths of
two models do not say this: models of one family pad their vocabularies to different widths, and
models of two families may have the same width. The tokens and what probe strings encode to do.
"""

import hashlib
import json

from model.tokenizer import Tokenizer

# What tokenizers treat differently: spaces, digits, case, contractions, code, scripts, combining
# characters, emoji, control characters.
PROBES = (
  'The quick brown fox jumps over the lazy dog.',
  "  It's 12:34 o'clock,\tdon't   you think?\n\n  \r\n",
  'def f(x):\n\treturn [x ** 2 for _ in range(1234567890)]  # 3.14159e-10\n',
  'CamelCase snake_case KEBAB-CASE https://example.org/?q=1&r=%20',
  'Grüße, naïve café, Ærøskøbing; e\u0301 is combined',
  '日本語の文章と中文句子和한국어 문장',
  'Привет, мир! مرحبا بالعالم שלום नमस्ते',
  '😀👨‍👩‍👧 \u200b\ufeff\x00\x7f',
)


def length(teacher: Tokenizer, student: Tokenizer) -> int:
  """Returns the number of leading ids that mean the same token in both.

  One may have more tokens than the other, as a model has that was tuned for chats: the shared
  length is that of the shorter one.

  Raises:
    ValueError: a token, the encoding of a probe, or the token at the beginning or end of a text
      differs; the message says which.
  """
  shared = min(teacher.vocab_size, student.vocab_size)
  differences = _differences(teacher, student, shared)
  first = next(differences, None)
  if first is not None:
    raise ValueError(
      f'a teacher of another tokenizer: {first}. Distributions over tokens can only be compared '
      'where the same id means the same token; take a teacher of the same family'
    )
  return shared


def fingerprint(tokenizer: Tokenizer) -> str:
  """SHA-256 of the tokens, of what the probes encode to, and of the special tokens."""
  tokens = [tokenizer.codec.token_of(i) for i in range(tokenizer.vocab_size)]
  encoded = [tokenizer.encode(probe) for probe in PROBES]
  what = [tokens, encoded, tokenizer.bos_id, list(tokenizer.eos_ids)]
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _differences(teacher, student, shared):
  for probe in PROBES:
    theirs, ours = teacher.encode(probe), student.encode(probe)
    if theirs != ours:
      yield f'{probe!r} is {_short(theirs)} for the teacher and {_short(ours)} for the student'
  for i in range(shared):
    theirs, ours = teacher.codec.token_of(i), student.codec.token_of(i)
    if theirs != ours:
      yield f'token {i} is {theirs!r} for the teacher and {ours!r} for the student'
  if teacher.bos_id != student.bos_id:
    yield f'a text begins with token {teacher.bos_id} there and {student.bos_id} here'
  if teacher.eos_ids[:1] != student.eos_ids[:1]:
    yield f'a text ends with tokens {list(teacher.eos_ids)} there and {list(student.eos_ids)} here'


def _short(ids: list[int]) -> str:
  shown = ', '.join(map(str, ids[:8]))
  return f'[{shown}, ...]' if len(ids) > 8 else f'[{shown}]'
