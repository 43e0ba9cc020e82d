"""The tokenizer in a GGUF file, as the files of a Hugging Face folder.

Both kinds of vocabulary become byte-pair encodings of the tokenizers library. Byte-level ones have
their merges in the file. Those of sentencepiece have a score for each token: any two neighbours
whose text together is a token may merge, those with the highest score first, so the merges are all
ways to cut a token into two, in order of score.
"""

import json
import re

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from model import sentencepiece_model
from model.gguf import pre_tokenizers, vocabulary
from model.gguf.container import Container
from model.gguf.vocabulary import SENTENCEPIECE, TokenType, Vocabulary
from model.tokenizer import Tokenizer

_SPACE = '▁'
# Rows of the embedding without a token, which the converter names so.
_PADDING = re.compile(r'\[PAD\d+\]')


def to_tokenizer(file: Container) -> Tokenizer | None:
  """Builds the tokenizer; None if the file has no vocabulary.

  Raises ValueError where the vocabulary or its pre-tokenizer is not supported, or incomplete.
  """
  try:
    found = vocabulary.read(file)
    return None if found is None else Tokenizer.from_files(_files(file, found))
  except ValueError as error:
    raise ValueError(f'{file.path}: {error}') from error


def _files(file, found):
  ids = vocabulary.special_ids(file)
  files = {
    'tokenizer.json': _tokenizer(file, found).to_str().encode(),
    'tokenizer_config.json': _to_bytes(_settings(file, found, ids)),
    'generation_config.json': _to_bytes({k: v for k, v in ids.items() if v is not None}),
  }
  template = file.metadata.get('tokenizer.chat_template')
  return files | ({'chat_template.jinja': template.encode()} if template else {})


def _settings(file, found, ids):
  ends = ids['eos_token_id']
  named = {
    'bos_token': ids['bos_token_id'],
    'eos_token': ends[0] if isinstance(ends, list) else ends,
    'pad_token': ids['pad_token_id'],
    'unk_token': _unknown_id(file, found),
  }
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    **{name: None if i is None else found.tokens[i] for name, i in named.items()},
    'add_bos_token': vocabulary.adds_bos(file, found),
    'add_eos_token': vocabulary.setting(file, 'add_eos_token', False),
    'clean_up_tokenization_spaces': False,
  }


def _unknown_id(file, found):
  return vocabulary.token_id(file, 'unknown', 0 if found.model == SENTENCEPIECE else None)


def _tokenizer(file: Container, found: Vocabulary) -> tokenizers.Tokenizer:
  build = _sentencepiece if found.model == SENTENCEPIECE else _byte_level
  try:
    built = build(file, found)
  except ValueError:
    raise
  except Exception as error:  # the library raises nothing more specific
    raise ValueError(f'the vocabulary is damaged: {error}') from error
  added = lambda special, *types: [
    tokenizers.AddedToken(found.tokens[i], special=special, normalized=False)
    for i in found.of_type(*types)
    if found.tokens[i]
  ]
  built.add_special_tokens(added(True, TokenType.CONTROL, TokenType.UNKNOWN))
  built.add_tokens(added(False, TokenType.USER_DEFINED))
  built.post_processor = _post_processor(file, found)
  return built


def _ids(found: Vocabulary) -> dict[str, int]:
  unused = [i for i in found.of_type(TokenType.UNUSED) if _PADDING.fullmatch(found.tokens[i])]
  unused = set(unused)
  return {token: i for i, token in enumerate(found.tokens) if i not in unused}


def _byte_level(file, found):
  pre = pre_tokenizers.find(vocabulary.setting(file, 'pre', 'default'))
  # A token may begin with a space; what parts the two tokens of a merge is the next one.
  merges = [
    (merge[: merge.find(' ', 1)], merge[merge.find(' ', 1) + 1 :]) for merge in found.merges
  ]
  model = models.BPE(vocab=_ids(found), merges=merges, ignore_merges=pre.ignore_merges)
  built = tokenizers.Tokenizer(model)
  if pre.composed:
    built.normalizer = pre.normalizer()
  built.pre_tokenizer = pre.build()
  built.decoder = decoders.ByteLevel()
  return built


def _sentencepiece(file, found):
  ids, unknown = _ids(found), _unknown_id(file, found)
  model = models.BPE(
    vocab=ids,
    merges=_merges(found, ids),
    unk_token=None if unknown is None else found.tokens[unknown],
    fuse_unk=True,
    byte_fallback=bool(found.of_type(TokenType.BYTE)),
  )
  built = tokenizers.Tokenizer(model)
  prefix = vocabulary.setting(file, 'add_space_prefix', True)
  to_pieces = [normalizers.Prepend(_SPACE)] if prefix else []
  built.normalizer = normalizers.Sequence([*to_pieces, normalizers.Replace(' ', _SPACE)])
  to_text = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  built.decoder = decoders.Sequence(to_text + ([decoders.Strip(' ', 1, 0)] if prefix else []))
  return built


def _merges(found, ids):
  kinds = TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED
  order = {found.tokens[i]: -found.scores[i] for i in found.of_type(*kinds)}
  key = lambda ranked: (ranked[0], *(ids[half] for half in ranked[1]))
  return [pair for _, pair in sorted(sentencepiece_model.merges(order, ids), key=key)]


def _post_processor(file, found):
  """Adds BOS and EOS as the file says, for the programs that ask for special tokens."""
  ids = vocabulary.special_ids(file)
  ends = ids['eos_token_id']
  bos, eos = ids['bos_token_id'], ends[0] if isinstance(ends, list) else ends
  before = [bos] if vocabulary.adds_bos(file, found) and bos is not None else []
  after = [eos] if vocabulary.setting(file, 'add_eos_token', False) and eos is not None else []
  if not before + after:
    return processors.ByteLevel(trim_offsets=False)
  around = lambda letter, segment: [
    *(f'{found.tokens[i]}:{segment}' for i in before),
    f'${letter}:{segment}',
    *(f'{found.tokens[i]}:{segment}' for i in after),
  ]
  return processors.TemplateProcessing(
    single=around('A', 0),
    pair=around('A', 0) + around('B', 1),
    special_tokens=[(found.tokens[i], i) for i in {*before, *after}],
  )


def _to_bytes(value: dict) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
