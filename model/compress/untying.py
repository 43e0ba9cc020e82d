"""Gives a tied head a matrix of its own, so that embedding and head can be stored differently.

Embedding and head were tied by Press & Wolf (2017), https://arxiv.org/abs/1608.05859. Apart, the
lookup can be stored in fewer bits than the product, which loses more by rounding; it costs the
bytes of a second matrix. The outputs of the model do not change.
"""

import dataclasses

from model.compress.registry import Reshaped, technique
from model.transformer import parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class UntieSpec:
  """There are no options."""


def check(config, spec) -> None:
  """Raises ValueError if the head of a model is a matrix of its own already."""
  del spec
  if not config.tied:
    raise ValueError('the head is not tied to the embedding; leave this step out')


def _reshapes(model, spec):
  del spec
  return model.config.replace(tied=False)


@technique(
  'untie',
  spec=UntieSpec,
  paper='Press & Wolf 2017, https://arxiv.org/abs/1608.05859',
  scope='shape',
  check=check,
  reshapes=_reshapes,
  calibrates=lambda spec: False,
)
def untie(model, measurements, spec):
  """Give a tied head a matrix of its own, so that embedding and head are compressed apart."""
  del measurements
  values = {path: param.get_value() for path, param in parameters(model).items()}
  values['head.weight'] = values['embedding.table'].T
  return Reshaped(config=_reshapes(model, spec), parameters=values)
