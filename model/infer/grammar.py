"""Grammars that a continuation must follow: JSON schemas, regular expressions, Lark grammars.

The states are those of llguidance (https://github.com/guidance-ai/llguidance), which computes the
tokens that may come next from a trie of the vocabulary, in tens of microseconds for most grammars.
"""

from collections.abc import Mapping, Sequence

import llguidance
import numpy as np

from model.tokenizer import Tokenizer

# What a grammar may cost in memory and time; beyond it, it is refused or ends the continuation.
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000)
ANY_OBJECT = {'type': 'object'}


class Vocabulary:
  """The bytes of a tokenizer's tokens, and grammars over them, for a model of `vocab_size` rows."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
    self.vocab_size, self.eos_ids = vocab_size, tuple(eos_ids)
    self._tokens = llguidance.LLTokenizer(
      tokenizer.codec.to_json(),
      n_vocab=max(vocab_size, tokenizer.vocab_size),
      eos_token=list(eos_ids) or None,
    )

  def bytes_of(self, token: int) -> bytes:
    """The bytes that a token stands for; of special tokens, those of their names."""
    return self._tokens.decode_bytes([token])

  def json(self, schema: Mapping | None = None) -> 'Grammar':
    """The texts that are JSON objects or, with a schema, those that follow it."""
    schema = ANY_OBJECT if schema is None else schema
    # A model that may put white space anywhere may do so for ever.
    compact = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(dict(schema), overrides=compact)
    return self._checked(grammar, 'JSON schema')

  def regex(self, pattern: str) -> 'Grammar':
    """The texts that match a regular expression as a whole."""
    grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    return self._checked(grammar, 'regular expression')

  def lark(self, text: str) -> 'Grammar':
    """The texts of a context-free grammar in Lark's notation."""
    return self._checked(llguidance.LLMatcher.grammar_from_lark(text), 'grammar')

  def _checked(self, grammar, what):
    if not self.eos_ids:
      raise ValueError('the model has no end token, with which a text that follows a grammar ends')
    matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
      raise ValueError(f'the {what} cannot be followed: {matcher.get_error()[:500]}')
    return Grammar(matcher, self.vocab_size)


class Grammar:
  """A compiled grammar; each continuation gets a guide of its own."""

  def __init__(self, matcher, vocab_size: int):
    self._matcher, self._vocab_size = matcher, vocab_size

  def guide(self) -> 'GrammarGuide':
    return GrammarGuide(self._matcher.deep_copy(), self._vocab_size)


class GrammarGuide:
  """The state of a grammar for one continuation: a `Guide`.

  Once the text is complete, or the grammar has exceeded its limits, only end tokens may come.
  """

  def __init__(self, matcher, vocab_size: int):
    self._matcher, self._vocab_size = matcher, vocab_size

  def mask(self) -> np.ndarray:
    words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    words = words[: -(-self._vocab_size // 32)].copy()
    spare = len(words) * 32 - self._vocab_size  # tokens that only the tokenizer has
    if spare > 0:
      words[-1] &= np.uint32(0xFFFFFFFF >> spare)
    return words

  def advance(self, token: int) -> None:
    self._matcher.consume_token(token)
