"""What a call asks for, and how its answer is written."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence

from experiments.serving.choice import Choice, Piece
from experiments.serving.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """How the choices of an endpoint look.

  `opening` and `part` make the entries of a stream: one that begins a choice, if there is one, and
  one for a piece. `whole` makes a choice that is sent at once, from all of it in one piece.
  """

  prefix: str
  whole_object: str
  part_object: str
  opening: Callable[[Choice], dict] | None
  part: Callable[[Choice, Piece], dict]
  whole: Callable[[Choice, Piece], dict]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """A call that was found right: its choices, `settings.n` for each prompt in order."""

  model: str
  settings: Settings
  choices: tuple[Choice, ...]
  form: Form
  name: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def part(self, entries: list[dict]) -> dict:
    """The event of a stream that has these entries of choices."""
    usage = {'usage': None} if self.settings.include_usage else {}
    if self.settings.continuous_usage:
      usage = {'usage': self.usage()}
    return self._head(self.form.part_object) | {'choices': entries} | usage

  def usage_part(self) -> dict:
    """The event of a stream that says what it took."""
    return self._head(self.form.part_object) | {'choices': [], 'usage': self.usage()}

  def whole(self, pieces: Sequence[Piece]) -> dict:
    """The answer at once, from all of each choice."""
    entries = [self.form.whole(c, piece) for c, piece in zip(self.choices, pieces, strict=True)]
    return self._head(self.form.whole_object) | {'choices': entries, 'usage': self.usage()}

  def usage(self) -> dict:
    """Tokens, where a prompt with several choices counts once."""
    firsts = self.choices[:: self.settings.n]
    prompt = sum(len(choice.request.prompt) for choice in firsts)
    new = sum(choice.tokens for choice in self.choices)
    return {
      'prompt_tokens': prompt,
      'completion_tokens': new,
      'total_tokens': prompt + new,
      'prompt_tokens_details': {'cached_tokens': sum(choice.cached_tokens for choice in firsts)},
    }

  def _head(self, kind):
    name = f'{self.form.prefix}-{self.name}'
    return {'id': name, 'object': kind, 'created': self.created, 'model': self.model}
