"""What the server serves: a model with its tokenizer, its names and its limits."""

import dataclasses

from experiments.serving.body import Fields, shown
from experiments.serving.errors import ApiError, invalid
from experiments.serving.limits import Limits
from experiments.serving.tools.formats import Format
from experiments.serving.words import Words
from model.infer.grammar import Vocabulary
from model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """A model as calls see it. `capacity` is the most tokens of a prompt with its continuation."""

  name: str
  tokenizer: Tokenizer
  vocabulary: Vocabulary
  capacity: int
  adapters: tuple[str, ...] = ()
  limits: Limits = Limits()
  tool_format: Format | None = None  # how the model writes calls of tools; None: not known

  @property
  def vocab_size(self) -> int:
    return self.vocabulary.vocab_size

  @property
  def words(self) -> Words:
    return Words(self.vocabulary)

  @property
  def chats(self) -> bool:
    return self.tokenizer.chat_template is not None

  def model(self, fields: Fields) -> tuple[str, str | None]:
    """The name that a call gives, and the adapter that it means. Raises ApiError: no such model."""
    name = fields.text('model', self.name)
    if name != self.name and name not in self.adapters:
      raise no_such_model(name, (self.name, *self.adapters))
    return name, None if name == self.name else name

  def check_text(self, text: str) -> None:
    """Raises ApiError if a text is too long for the context, whatever its tokens are."""
    if len(text) > self.capacity * self.vocabulary.longest:
      raise invalid(
        'prompt',
        f'the prompt has {len(text)} characters, which are more tokens than the context has here, '
        f'{self.capacity}',
        code='context_length_exceeded',
      )

  def check_tokens(self, prompts: list[list[int]]) -> None:
    """Raises ApiError if a text has tokens that the tokenizer has and the model does not."""
    highest = max(max(prompt) for prompt in prompts)
    if highest >= self.vocab_size:
      raise invalid('prompt', f'the text has the token {highest}, which the model does not know')


def no_such_model(name: str, known: tuple[str, ...]) -> ApiError:
  message = f'there is no model {shown(name)} here; this server has {", ".join(known)}'
  return ApiError(404, message, param='model', code='model_not_found')
