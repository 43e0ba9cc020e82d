"""The vocabulary in the metadata of a GGUF file: tokens, what they are, and the special ids."""

import dataclasses
import enum
from typing import Any

from model.gguf import pre_tokenizers
from model.gguf.container import Container

BYTE_LEVEL, SENTENCEPIECE = 'gpt2', 'llama'
PREFIX = 'tokenizer.ggml.'
# Control tokens that end a turn in the families' chat formats, whether or not the file says so.
_ENDS_OF_TURNS = ('<|eot_id|>', '<|eom_id|>', '<|im_end|>', '<|end|>', '<end_of_turn>')


class TokenType(enum.IntEnum):
  """What `tokenizer.ggml.token_type` says of a token."""

  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3
  USER_DEFINED = 4
  UNUSED = 5
  BYTE = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """Tokens by id. `scores` are there for sentencepiece alone, `merges` for byte-level BPE alone."""

  model: str  # BYTE_LEVEL or SENTENCEPIECE
  tokens: list[str]
  types: list[int]
  scores: list[float]
  merges: list[str]

  def __post_init__(self):
    for name, values in (('token_type', self.types), ('scores', self.scores)):
      if len(values) not in (0, len(self.tokens)):
        raise ValueError(
          f'{PREFIX}{name} has {len(values)} entries, but there are {len(self.tokens)} tokens'
        )
    needed = {BYTE_LEVEL: ('merges', self.merges), SENTENCEPIECE: ('scores', self.scores)}
    name, values = needed[self.model]
    if not self.tokens or not values:
      raise ValueError(f'{PREFIX}{name if self.tokens else "tokens"} is missing')

  def of_type(self, *types: TokenType) -> list[int]:
    return [i for i, kind in enumerate(self.types) if kind in types]


def read(file: Container) -> Vocabulary | None:
  """The vocabulary of a file; None if it has none.

  Raises ValueError where it is of a kind that is not supported, or incomplete.
  """
  model = file.metadata.get(f'{PREFIX}model', 'none')
  if model in ('none', 'no_vocab'):
    return None
  if model not in (BYTE_LEVEL, SENTENCEPIECE):
    raise ValueError(
      f'{PREFIX}model = {model!r} is not supported; supported: {BYTE_LEVEL}, {SENTENCEPIECE}'
    )
  tokens = _list(file, 'tokens', str)
  return Vocabulary(
    model=model,
    tokens=tokens,
    types=_list(file, 'token_type', int) or [TokenType.NORMAL] * len(tokens),
    scores=_list(file, 'scores', float),
    merges=_list(file, 'merges', str),
  )


def _list(file, name, kind):
  values = file.metadata.get(f'{PREFIX}{name}', [])
  if not isinstance(values, list) or any(type(value) is not kind for value in values):
    raise ValueError(f'{PREFIX}{name} must be a list of {kind.__name__}')
  return values


def setting(file: Container, name: str, default: Any) -> Any:
  """A value under `tokenizer.ggml.`, of the type of its default if that has one."""
  value = file.metadata.get(f'{PREFIX}{name}', default)
  if default is not None and type(value) is not type(default):
    raise ValueError(f'{PREFIX}{name} must be of {type(default).__name__}, not {value!r}')
  return value


def adds_bos(file: Container, vocabulary: Vocabulary) -> bool:
  """Whether a text begins with the BOS token: as the file says, or as llama.cpp assumes."""
  if vocabulary.model == SENTENCEPIECE:
    return setting(file, 'add_bos_token', True)
  default = pre_tokenizers.find(setting(file, 'pre', 'default')).adds_bos
  return setting(file, 'add_bos_token', default)


def token_id(file: Container, name: str, default: int | None = None) -> int | None:
  """The id under `tokenizer.ggml.{name}_token_id`, which must be that of a token."""
  value = file.metadata.get(f'{PREFIX}{name}_token_id', default)
  tokens = file.metadata.get(f'{PREFIX}tokens')
  count = len(tokens) if isinstance(tokens, list) else None
  if value is not None and (type(value) is not int or not 0 <= value < (count or value + 1)):
    raise ValueError(f'{PREFIX}{name}_token_id = {value!r} is no id of one of {count} tokens')
  return value


def special_ids(file: Container) -> dict[str, Any]:
  """The special tokens as config.json has them; the first end of a text is the file's own."""
  vocabulary = read(file)
  pieces = vocabulary is not None and vocabulary.model == SENTENCEPIECE
  ends = [token_id(file, 'eos', 2 if pieces else None)]
  ends += [token_id(file, 'eot'), token_id(file, 'eom')]
  if vocabulary is not None:
    control = vocabulary.of_type(TokenType.CONTROL)
    ends += [i for i in control if vocabulary.tokens[i] in _ENDS_OF_TURNS]
  ends = [i for i in dict.fromkeys(ends) if i is not None]
  return {
    'bos_token_id': token_id(file, 'bos', 1 if pieces else None),
    'eos_token_id': ends[0] if len(ends) == 1 else ends or None,
    'pad_token_id': token_id(file, 'padding'),
  }
