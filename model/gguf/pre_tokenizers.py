"""How byte-level vocabularies split text before they merge: the names in `tokenizer.ggml.pre`.

The patterns are those of the tokenizers that the names stand for, Unicode normalization included.
llama.cpp leaves that out, so texts that are not in the composed form (NFC) differ there.
"""

import dataclasses
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LLAMA3 = rf'{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}'
_QWEN2 = rf'{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_MARKS}'
# Words that begin with capitals, by case: the vocabularies of Mistral Nemo and GPT-4o.
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED = (
  rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|'
  r'\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
  """Patterns that are split off one after another, each match a piece of its own."""

  patterns: tuple[str, ...]
  digits: bool = False  # each digit alone, before the patterns
  composed: bool = False  # NFC first
  ignore_merges: bool = False  # a piece that is a token is not built from merges
  adds_bos: bool = False  # where the file does not say

  def normalizer(self) -> normalizers.Normalizer | None:
    return normalizers.NFC() if self.composed else None

  def build(self) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
    parts += [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in self.patterns]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(parts)


_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_SMOLLM = PreTokenizer((_GPT2,), digits=True)
_NEOX = PreTokenizer((_GPT2,), composed=True)
PRE_TOKENIZERS = {
  # What llama.cpp does where a file does not name any.
  'default': PreTokenizer((r'[\p{P}\$\+<=>\^~\|]+', _GPT2, r'\p{N}+', '[0-9][0-9][0-9]')),
  'gpt-2': PreTokenizer((_GPT2,)),
  'phi-2': PreTokenizer((_GPT2,)),
  'mpt': _NEOX,
  'olmo': _NEOX,
  'smollm': _SMOLLM,
  'starcoder': _SMOLLM,
  'refact': _SMOLLM,
  'minerva-7b': _SMOLLM,
  'llama-bpe': _LLAMA_BPE,
  'llama3': _LLAMA_BPE,
  'llama-v3': _LLAMA_BPE,
  'falcon3': _LLAMA_BPE,
  'dbrx': PreTokenizer((_LLAMA3,)),
  'smaug-bpe': PreTokenizer((_LLAMA3,)),
  'qwen2': PreTokenizer((_QWEN2,), composed=True),
  'deepseek-r1-qwen': PreTokenizer((_QWEN2,)),
  'megrez': PreTokenizer((_QWEN2,)),
  'stablelm2': PreTokenizer((_QWEN2,)),
  'tekken': PreTokenizer((_CASED % ('', '', ''),), ignore_merges=True, adds_bos=True),
  'gpt-4o': PreTokenizer((_CASED % (f'{_CONTRACTIONS}?', f'{_CONTRACTIONS}?', '{1,3}'),)),
  'deepseek-coder': PreTokenizer(
    (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', '[一-龥ࠀ-一가-퟿]+', r'\p{N}')
  ),
}


def find(name: str) -> PreTokenizer:
  if name not in PRE_TOKENIZERS:
    raise ValueError(
      f'tokenizer.ggml.pre = {name!r} is not supported; supported: {", ".join(PRE_TOKENIZERS)}'
    )
  return PRE_TOKENIZERS[name]


def name_of(
  tokenizer: Tokenizer, ignore_merges: bool, texts: Sequence[str]
) -> tuple[str, list[str]]:
  """The first name that splits `texts` as a tokenizer does, and what it does not say of it.

  A row that also normalizes and merges as the tokenizer does is preferred. Raises ValueError if no
  row splits so.
  """
  own = _Splits(tokenizer.pre_tokenizer, tokenizer.normalizer)
  same = [n for n, row in PRE_TOKENIZERS.items() if _Splits(row.build()).of(texts) == own.of(texts)]
  if not same:
    raise ValueError(
      'the tokenizer splits text in a way that has no name in GGUF files; known are '
      f'{", ".join(PRE_TOKENIZERS)}'
    )
  normalized = own.normalized(texts)
  alike = {
    name: (
      _Splits(None, PRE_TOKENIZERS[name].normalizer()).normalized(texts) == normalized,
      PRE_TOKENIZERS[name].ignore_merges == ignore_merges,
    )
    for name in same
  }
  best = max(same, key=lambda name: sum(alike[name]))
  notes = []
  if not alike[best][0]:
    notes.append(f'the normalization of text before it is split is not in the file ({best})')
  if not alike[best][1]:
    notes.append(f'whether whole words are looked up before merges is not in the file ({best})')
  return best, notes


@dataclasses.dataclass(frozen=True)
class _Splits:
  """What a tokenizer makes of text before it merges."""

  pre_tokenizer: pre_tokenizers.PreTokenizer | None
  normalizer: normalizers.Normalizer | None = None

  def of(self, texts: Sequence[str]) -> list[list[str]]:
    return [[piece for piece, _ in self.pre_tokenizer.pre_tokenize_str(text)] for text in texts]

  def normalized(self, texts: Sequence[str]) -> list[str]:
    return [
      text if self.normalizer is None else self.normalizer.normalize_str(text) for text in texts
    ]
