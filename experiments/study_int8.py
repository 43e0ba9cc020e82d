r"""Shows what 8-bit products and an 8-bit optimizer cost in training from scratch.

  python -m experiments.study_int8 --output=experiments/results/study_int8.jsonl

A model of the shape of the base of `small_models` is trained from scratch on the same text, with
initial weights and an order of its own for each seed. The arms:

  float         float32 products, AdamW
  int8_inputs   int8 products, forward and for the gradient of the inputs
  int8_all      int8 products for the gradient of the weights too
  adam8bit      float32 products, the moments of AdamW in 8 bits

`train_loss` is the mean over the last tenth of the updates, with the products of the arm;
`cross_entropy` that of held-out text, with the stored float weights. The claims, counted over the
seeds:

  Q1  int8_inputs ends within 0.5 % of the loss of float, int8_all within 1.5 %
  O1  adam8bit ends within 0.5 %

Device: any; only hardware with int8 products in XLA gains speed. Minutes: not measured yet.
"""

import dataclasses

from flax import nnx

from experiments import arms, small_models
from experiments import base as embedded
from experiments.arms import Options, rises
from experiments.small_models import SmallModels
from model import learned
from model.transformer import Transformer
from ops.int8_training import Backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """How a model is trained: which gradients are int8 products, if any, and the optimizer."""

  backward: Backward | None = None
  optimizer: str = 'adamw'
  learning_rates: tuple[float, ...] = (small_models.PLAN.learning_rate,)


ARMS = {
  'float': Arm(),
  'int8_inputs': Arm(backward='inputs'),
  'int8_all': Arm(backward='all'),
  'adam8bit': Arm(optimizer='adam8bit'),
}
CLAIMS = tuple(
  rises(name, metric, (arm, 'float'), slack)
  for metric in ('train_loss', 'cross_entropy')
  for name, arm, slack in (
    ('Q1', 'int8_inputs', 1.005),
    ('Q1', 'int8_all', 1.015),
    ('O1', 'adam8bit', 1.005),
  )
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=small_models.PLAN.steps)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Trains a model from scratch."""
  del before
  config = embedded.config(setting.plan, setting.tokenizer)
  model = Transformer(config, rngs=nnx.Rngs(seed))
  if arm.backward is not None:
    model = learned.with_int8_products(model, arm.backward)
  fit_config = small_models.fit_config(setting.steps, rate, arm.optimizer)
  model, trained = small_models.fit(model, setting.data(seed, setting.steps), fit_config)
  model = learned.finish(model)
  return model, {**small_models.quality(setting, model), **trained}


STUDY = arms.Study(
  name='study_int8',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('float', 'int8_inputs'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
