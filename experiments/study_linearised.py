r"""Shows what a model keeps when its attention becomes linear, beside a window of as many bytes.

  python -m experiments.study_linearised --output=experiments/results/study_linearised.jsonl

A dense model learns to recall what a text told earlier, as in `study_attention`. Both of its layers
are then changed, and it goes on learning for as many updates as it had:

  dense     the model that the others start from, with no more updates
  windowed  the last 16 tokens and the first (step `sparse_attention`)
  linear    a state of constant size (step `linearize`)
  decaying  such a state, whose channels decay by the token (`linearize: {mixer: decaying}`)

17 tokens in bfloat16 have the bytes of a state in float32: 4 heads of 16 x 17 numbers. `cached` is
how many numbers there are, `recall_far` counts what was told beyond the reach of both windows, from
31 tokens on. The claims, counted over the seeds:

  T1  a window recalls near, and of what is beyond its reach less than a third of what dense does
  T2  a state recalls more of that than a window

Device: any. Minutes: 20 on two CPU cores.
"""

import dataclasses
from typing import Any

from flax import nnx

from experiments import arms, study_attention
from experiments.arms import at_least, rises
from experiments.study_attention import Setting
from model.compress import pipeline, recipe
from model.transformer import Transformer

DENSE, PATTERN, FAR = 'dense', 'window16+first1', 2 * 15 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """The step that changes all layers of the dense model; None: it stays as it is."""

  step: dict[str, Any] | None = None
  learning_rates: tuple[float, ...] = (4e-3,)


ARMS = {
  DENSE: Arm(),
  'windowed': Arm(step={'sparse_attention': {'pattern': PATTERN, 'full_every': None}}),
  'linear': Arm(step={'linearize': {'full_every': None}}),
  'decaying': Arm(step={'linearize': {'full_every': None, 'mixer': 'decaying', 'memory': 64}}),
}
CLAIMS = (
  at_least('T1', 'recall_near', 'windowed', 0.9),
  rises('T1', 'recall_far', ('windowed', DENSE), slack=0.33),
  rises('T2', 'recall_far', ('windowed', 'linear'), slack=0.8),
  rises('T2', 'recall_far', ('windowed', 'decaying'), slack=0.8),
)


def train(
  setting: Setting, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Trains the dense model from scratch, or another one from it, and measures it."""
  if arm.step is None:
    config = study_attention.config(study_attention.ARMS[DENSE], setting.task)
    start = Transformer(config, rngs=nnx.Rngs(seed))
    return study_attention.learn(setting, start, seed, rate, FAR)
  steps = recipe.parse({'name': 'retrofit', 'steps': [arm.step]})
  start, _ = pipeline.compress(before(DENSE), steps)
  return study_attention.learn(setting, start, seed, rate, FAR)


STUDY = arms.Study(
  name='study_linearised',
  arms=ARMS,
  claims=CLAIMS,
  smoke=tuple(ARMS),
  prepare=study_attention.prepare,
  train=train,
  describe=lambda arm: {'step': arm.step},
)

if __name__ == '__main__':
  arms.main(STUDY)
