r"""Shows what experts made of a trained dense model are worth after a little training.

  python -m experiments.study_upcycling --output=experiments/results/study_upcycling.jsonl

The dense base of `small_models` becomes a model of eight experts, two per token, and is trained for
a tenth of the base's updates; each seed has its own router, passages and order. The arms:

  scratch   the same shape from random weights, its own learning rates
  dense     the base, trained on without experts
  copy      eight copies of the feed-forward networks
  drop      copies of which half of the channels are drawn anew
  granular  sixteen halves of eight copies, four per token

and copy_start and granular_start, which are not trained. `logit_difference` is the largest change
of a logit against the base, as a share of the largest logit. The claims, counted over the seeds:

  U1  copies and their halves compute what the base did before they are trained
  U2  with the small budget, every upcycled model beats the one from scratch
  U3  copies beat the dense base that is trained on; papers report it
      for half of the base's budget and more

Device: any. Minutes: 6 on a GPU, in two processes that share the arms.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import arms, small_models
from experiments import base as embedded
from experiments.arms import Claim, Options, at_best, rises
from experiments.small_models import SmallModels
from model.eval.records import Metric
from model.train.routing import Balanced
from model.train.step import Task
from model.transformer import Transformer

STEPS = 120
EXPERTS, CHOICES = 8, 2
EXACT = 1e-5
ROWS = 4  # windows on which logits are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """What is trained: the base, what a step makes of it, or the routed shape from scratch."""

  upcycle: dict | None = None
  scratch: bool = False


def _upcycled(**options) -> dict:
  return {'experts': EXPERTS, 'choices': CHOICES, **options}


COPY = _upcycled()
GRANULAR = {'experts': 2 * EXPERTS, 'choices': 2 * CHOICES, 'granularity': 2}
RATES = (1e-3,)
ARMS = {
  'scratch': Arm(scratch=True, learning_rates=(2e-3, 4e-3)),
  'dense': Arm(learning_rates=RATES),
  'copy': Arm(upcycle=COPY, learning_rates=RATES),
  'drop': Arm(upcycle=_upcycled(mode='drop'), learning_rates=RATES),
  'granular': Arm(upcycle=GRANULAR, learning_rates=RATES),
  'copy_start': Arm(upcycle=COPY),
  'granular_start': Arm(upcycle=GRANULAR),
}
LOSS, DIFFERENCE = 'cross_entropy', 'logit_difference'


def _exact(arm: str) -> Claim:
  holds = lambda runs: at_best(runs, arm)[DIFFERENCE] <= EXACT
  return Claim('U1', f'{DIFFERENCE} of {arm} <= {EXACT}', (arm,), holds)


CLAIMS = (
  _exact('copy_start'),
  _exact('granular_start'),
  *(rises('U2', LOSS, (arm, 'scratch')) for arm in ('copy', 'drop', 'granular')),
  rises('U3', LOSS, ('copy', 'dense')),
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=STEPS)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Makes the experts of an arm, and trains them if it has a learning rate."""
  del before
  model, trained = _start(setting, arm, seed), {}
  if not rate:
    trained[DIFFERENCE] = Metric(_difference(setting, model), '1', ROWS)
  else:
    objective = {} if arm == ARMS['dense'] else {'objective': Balanced()}
    config, data = small_models.fit_config(setting.steps, rate), setting.data(seed, setting.steps)
    model, trained = small_models.fit(model, data, config, Task(**objective))
  base = Metric(setting.base_loss, 'nat/token', setting.windows.predicted)
  return model, {**small_models.quality(setting, model), **trained, 'base_cross_entropy': base}


def _start(setting, arm, seed) -> Transformer:
  if arm.scratch:
    shape = small_models.routed(embedded.config(setting.plan, setting.tokenizer), EXPERTS, CHOICES)
    return Transformer(shape, rngs=nnx.Rngs(seed))
  if arm.upcycle is None:
    return setting.base
  step = {'upcycle': {**arm.upcycle, 'seed': seed}}
  return small_models.compress(setting.base, step, setting.calibration(seed))


def _difference(setting, model) -> float:
  """The largest change of a logit against the base, as a share of the largest logit."""
  tokens_BT = setting.windows.tokens_BT[:ROWS]
  with jax.default_matmul_precision('highest'):
    ours, theirs = (_logits(*nnx.split(one), tokens_BT) for one in (model, setting.base))
  return float(jnp.abs(ours - theirs).max() / np.abs(theirs).max())


def _logits(graphdef, state, tokens_BT) -> jax.Array:
  return jax.jit(lambda state, tokens_BT: nnx.merge(graphdef, state)(tokens_BT))(state, tokens_BT)


STUDY = arms.Study(
  name='study_upcycling',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('copy_start', 'copy'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
