"""Where a text ends and its continuation begins in tokens, as `lm-evaluation-harness` has it.

The rules are those of its class for transformers' models, so that both score the same tokens:

- Both texts are encoded together, with the special tokens that the tokenizer's files ask for, and
  as many tokens are the context as it has alone. White space at the end of a context goes to the
  continuation first, because tokens begin with spaces.
- Without a context, the continuation follows the BOS, or the end of a text where there is no BOS.
- A text that begins with the words of the BOS gets no second one.
- A whole text is scored in windows, each of which predicts what the one before did not reach, after
  as many tokens as fit.
"""

from collections.abc import Sequence

from model.eval.likelihood import Request
from model.tokenizer import Tokenizer


def prefix_id(tokenizer: Tokenizer) -> int:
  """The token that stands before a text without a context. Raises ValueError if there is none."""
  if tokenizer.bos_id is not None:
    return tokenizer.bos_id
  if not tokenizer.eos_ids:
    raise ValueError('the tokenizer has neither a BOS nor an EOS, one of which begins a text')
  return tokenizer.eos_ids[0]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
  """Encodes a text with its special tokens, unless it begins with the BOS already."""
  begins = text.startswith(tokenizer.decode([prefix_id(tokenizer)]))
  return tokenizer.encode(text) if begins else tokenizer.prompt(text)


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
  """The tokens of a context and of what follows. Raises ValueError if nothing follows."""
  if context:
    tokens = encode(tokenizer, context + continuation)
    count = len(encode(tokenizer, context.rstrip()))
  else:
    tokens, count = tokenizer.encode(continuation), 0
  before = prefix_id(tokenizer)
  if count == 0:  # white space alone is no context either
    tokens, count = (tokens if tokens[:1] == [before] else [before, *tokens]), 1
  if len(tokens) <= count:
    raise ValueError(
      f'{continuation[:40]!r} adds no token to {context[-40:]!r}; a continuation has at least one'
    )
  return Request(tuple(tokens[:count]), tuple(tokens[count:]))


def windows(tokens: Sequence[int], before: int, max_length: int) -> list[Request]:
  """The windows in which a whole text is scored, after the token `before`.

  The first one predicts `max_length` tokens. The last one ends with the text, and reads
  `max_length` tokens though some of its predictions were made before.
  """
  tokens, found = list(tokens), []
  for begin in range(0, len(tokens), max_length):
    end = min(begin + max_length, len(tokens))
    # What is read: `max_length` tokens up to the last but one.
    read = [before, *tokens][max(0, end - max_length) : end]
    count = end - begin
    found.append(Request(tuple(read[: len(read) - count + 1]), tuple(tokens[begin:end])))
  return found
