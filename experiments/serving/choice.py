"""One continuation as it comes: its text up to a stop string, the scores of its tokens, its end."""

import dataclasses
from collections import deque
from collections.abc import Sequence

from experiments.serving.tools.calls import ToolCall
from experiments.serving.tools.stream import CallStream
from model.infer.request import Progress, Request, TokenLogprobs
from model.infer.stops import StoppedText
from model.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """A token with its log-probability, and the characters of the text that precede it.

  The first token of a text has no log-probability.
  """

  token: int
  logprob: float | None
  likeliest: tuple[tuple[int, float], ...]
  offset: int

  @classmethod
  def of(cls, one: TokenLogprobs, offset: int) -> 'Scored':
    likeliest = tuple((token, _finite(logprob)) for token, logprob in one.likeliest)
    return cls(token=one.token, logprob=_finite(one.logprob), likeliest=likeliest, offset=offset)


def _finite(logprob: float) -> float:
  return float(logprob) if logprob > LEAST_LOGPROB else LEAST_LOGPROB


@dataclasses.dataclass(kw_only=True)
class Piece:
  """What is new of a choice; `finish` and `stop` are set with the last piece.

  `calls` are calls of tools, which are no part of the text; `called` came before them.
  """

  text: str = ''
  calls: tuple[ToolCall, ...] = ()
  called: int = 0
  scored: tuple[Scored, ...] = ()
  tokens: int = 0
  finish: str | None = None
  stop: str | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
  """All pieces of a choice as one."""
  return Piece(
    text=''.join(piece.text for piece in pieces),
    calls=tuple(call for piece in pieces for call in piece.calls),
    scored=tuple(score for piece in pieces for score in piece.scored),
    tokens=sum(piece.tokens for piece in pieces),
    finish=pieces[-1].finish,
    stop=pieces[-1].stop,
  )


class Choice:
  """The state of one continuation.

  `finish` is None until it ends, then 'stop' or 'length'; `stop` is the stop string that ended it,
  `tokens` the number of tokens so far. `text` decodes and ends it. With `echo`, the prompt is the
  beginning of the text. With `tools`, calls are taken out of it; `called` counts them.
  """

  def __init__(
    self,
    index: int,
    request: Request,
    tokenizer: Tokenizer,
    text: StoppedText,
    *,
    echo: bool = False,
    tools: CallStream | None = None,
  ):
    self.index, self.request = index, request
    self.finish, self.tokens, self.cached_tokens = None, 0, 0
    self.echo = ''
    self._tokenizer, self._waiting = tokenizer, deque()
    self._text, self._tools = text, tools
    if echo:
      self.echo = tokenizer.decode(request.prompt, skip_special=True)
    self._echo_is_due = echo

  @property
  def called(self) -> int:
    return 0 if self._tools is None else self._tools.called

  @property
  def stop(self) -> str | None:
    return self._text.stop

  def take(self, progress: Progress) -> Piece:
    """Takes what the engine brings, up to the end of the continuation."""
    piece = Piece()
    self.cached_tokens = max(self.cached_tokens, progress.cached_tokens)
    if self._echo_is_due and (progress.prompt_logprobs or progress.tokens or progress.finish):
      self._echo_is_due = False
      piece.text = self.echo
      piece.scored = self._scored_prompt(progress.prompt_logprobs)
    scores = progress.logprobs or (None,) * len(progress.tokens)
    for token, score in zip(progress.tokens, scores, strict=True):
      if score is not None:
        self._waiting.append(Scored.of(score, len(self.echo) + self._text.known))
      piece.text += self._text.push(token)
      piece.tokens += 1
      if self.stop is not None:
        self.finish = 'stop'
        break
    if self.finish is None and progress.finish is not None:
      piece.text += self._text.end()
      self.finish = 'length' if progress.finish == 'length' and self.stop is None else 'stop'
    if self._tools is not None:
      piece.called = self.called
      split = self._tools.push(piece.text, ended=self.finish is not None)
      piece.text, piece.calls = split.text, split.calls
    self.tokens += piece.tokens
    piece.scored += tuple(self._certain())
    piece.finish, piece.stop = self.finish, self.stop
    return piece

  def _certain(self):
    """The scores of tokens whose text is certain; those of a stop string are dropped at the end."""
    given = len(self.echo) + self._text.given
    all_given = self.stop is None and self._text.known == self._text.given
    while self._waiting and (self._waiting[0].offset < given or all_given):
      yield self._waiting.popleft()

  def _scored_prompt(self, scores: Sequence[TokenLogprobs]) -> tuple[Scored, ...]:
    if self.request.prompt_logprobs is None:
      return ()
    first = Scored(token=self.request.prompt[0], logprob=None, likeliest=(), offset=0)
    text, found = StoppedText(self._tokenizer, ()), [first]
    text.push(first.token)
    for score in scores:
      found.append(Scored.of(score, text.known))
      text.push(score.token)
    return tuple(found)
