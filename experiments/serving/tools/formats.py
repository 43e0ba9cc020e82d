"""The formats of calls, and which one a chat template means."""

import dataclasses
import secrets
import string
from collections.abc import Callable

from experiments.serving.tools import hermes, llama3, mistral
from experiments.serving.tools.calls import Reader


def long_id() -> str:
  return f'call_{secrets.token_hex(12)}'


def _nine_letters() -> str:
  return ''.join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How a model writes calls.

  A chat template means it if it has one of the `marks` and none of the `others`, which belong to
  formats that share a mark. `variables` are the names by which templates look for tools.
  """

  read: Reader
  marks: tuple[str, ...]
  others: tuple[str, ...] = ()
  variables: tuple[str, ...] = ('tools',)
  new_id: Callable[[], str] = long_id

  def is_of(self, template: str) -> bool:
    has = lambda texts: any(text in template for text in texts)
    return has(self.marks) and not has(self.others)


FORMATS = {
  'hermes': Format(
    read=hermes.read,
    marks=(hermes.OPEN,),
    others=('<function=', '<arg_key>', '<tool_sep>'),  # Qwen3-Coder, GLM-4.5, Hunyuan
    variables=('tools', 'xml_tools'),  # SmolLM3
  ),
  'llama3': Format(read=llama3.read, marks=(llama3.TAG, '"parameters": dictionary of argument')),
  'mistral': Format(read=mistral.read, marks=(mistral.MARK,), new_id=_nine_letters),
}
AUTO, NONE = 'auto', 'none'
NAMES = (AUTO, *FORMATS, NONE)


def pick(name: str, template: str | None) -> Format | None:
  """The format of a name; 'auto': the first that the chat template means, or None."""
  if name != AUTO:
    return None if name == NONE else FORMATS[name]
  return next((one for one in FORMATS.values() if one.is_of(template or '')), None)
