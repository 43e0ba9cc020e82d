r"""Shows how much of what low-bit weights cost quantization-aware training brings back.

  python -m experiments.study_qat --output=experiments/results/study_qat.jsonl

The base of `small_models` goes on for some updates, with float weights or with weights that are
rounded in every product, on the same text in the same order. The arms:

  float                         float weights
  rtn_int4, rtn_int3, rtn_int2     those of `float`, rounded to nearest afterwards
  gptq_int4, gptq_int3, gptq_int2  those of `float`, quantized by GPTQ afterwards
  qat_int4, qat_int3, qat_int2     rounded while they learn

All weights of the blocks are symmetric in groups of 32. `recovered` is the share of what rounding
to nearest costs, in nats per token of held-out text, that an arm does not lose. As `float` was
trained as long, it is no gain of more training. The claims, counted over the seeds:

  Q3  at 4, 3 and 2 bits QAT has a lower loss than rounding to nearest and than GPTQ; it recovers
      the more, the fewer the bits, and at least 30 %, 50 % and 70 %

Device: any. Minutes: not measured yet.
"""

import dataclasses

from experiments import arms, small_models
from experiments.arms import Options, at_least, rises
from experiments.small_models import SmallModels
from model import learned
from model.learned import QatConfig
from model.transformer import Transformer

GROUP_SIZE = 32
STEPS = 200
NEAREST = 'round_to_nearest'
AT_LEAST = {'int4': 0.3, 'int3': 0.5, 'int2': 0.7}  # recovered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """Float weights, or weights in a format: by a technique after training, or learned."""

  format: str | None = None
  technique: str | None = None


ARMS = {'float': Arm(learning_rates=(1e-4,))}
ARMS |= {
  f'{name}_{number_format}': Arm(format=number_format, technique=technique)
  for number_format in AT_LEAST
  for name, technique in (('rtn', NEAREST), ('gptq', 'gptq'))
}
ARMS |= {
  f'qat_{number_format}': Arm(format=number_format, learning_rates=(1e-4, 3e-4, 1e-3))
  for number_format in AT_LEAST
}

LOSS = 'cross_entropy'
CLAIMS = (
  *(
    rises('Q3', LOSS, (f'qat_{number_format}', f'{other}_{number_format}'))
    for number_format in AT_LEAST
    for other in ('rtn', 'gptq')
  ),
  rises('Q3', 'recovered', tuple(f'qat_{number_format}' for number_format in AT_LEAST)),
  *(at_least('Q3', 'recovered', f'qat_{name}', bound) for name, bound in AT_LEAST.items()),
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=STEPS, group_size=GROUP_SIZE)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Trains with float or rounded weights, or quantizes the float arm's model."""
  if arm.technique is not None:
    model, trained = _quantized(setting, before('float'), arm.technique, arm.format, seed), {}
  else:
    model = setting.base
    if arm.format is not None:
      model = learned.attach(model, QatConfig(format=arm.format, group_size=GROUP_SIZE))
    config = small_models.fit_config(setting.steps, rate)
    model, trained = small_models.fit(model, setting.data(seed, setting.steps), config)
    model = learned.finish(model)
  metrics = {**small_models.quality(setting, model), **trained}
  if arm.format is not None:
    rounded = _quantized(setting, before('float'), NEAREST, arm.format, seed)
    best, worst = (small_models.quality(setting, m)[LOSS].value for m in (before('float'), rounded))
    metrics['recovered'] = small_models.recovered(best, worst, metrics[LOSS].value)
  return model, metrics


def _quantized(setting, model, technique: str, number_format: str, seed: int) -> Transformer:
  step = {technique: {'format': number_format, 'group_size': GROUP_SIZE}}
  return small_models.compress(model, step, setting.calibration(seed))


STUDY = arms.Study(
  name='study_qat',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('rtn_int3', 'qat_int3'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
