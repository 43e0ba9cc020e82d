r"""Shows how much of what low-bit weights cost quantization-aware training brings back.

  python -m experiments.study_qat --output=experiments/results/study_qat.jsonl

The weights of the blocks of the base of `small_models` become symmetric integers in groups of 128.
The arms:

  rtn_int4, rtn_int3, rtn_int2     rounded to nearest
  gptq_int4, gptq_int3, gptq_int2  quantized by GPTQ
  qat_int4, qat_int3, qat_int2     trained while they are rounded in every product

Training follows the base (LLM-QAT, Liu et al. 2023, https://arxiv.org/abs/2305.17888), so that an
arm does not gain from more training on text, which would say nothing about rounding. `recovered` is
the share of what rounding to nearest costs, in nats per token of held-out text, that an arm does
not lose. The claims, counted over the seeds:

  Q3  at 4, 3 and 2 bits QAT has a lower loss than rounding to nearest and than GPTQ; it recovers
      the more, the fewer the bits, and at least 30 %, 50 % and 70 %

Device: any. Minutes: 6 on a GPU, a format a process.
"""

import dataclasses

from experiments import arms, small_models
from experiments.arms import Options, at_least, rises
from experiments.small_models import SmallModels
from model import learned
from model.learned import QatConfig
from model.train.distill import TEACHER, Distillation
from model.train.step import Task
from model.transformer import Transformer

GROUP_SIZE = 128
STEPS = 400
NEAREST = 'round_to_nearest'
AT_LEAST = {'int4': 0.3, 'int3': 0.5, 'int2': 0.7}  # recovered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """Weights in a format, by a technique without training or, without one, learned."""

  format: str
  technique: str | None = None


RATES = (1e-4, 3e-4, 1e-3)
ARMS = {
  f'{name}_{number_format}': Arm(
    format=number_format, technique=technique, learning_rates=() if technique else RATES
  )
  for number_format in AT_LEAST
  for name, technique in (('rtn', NEAREST), ('gptq', 'gptq'), ('qat', None))
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
  """Quantizes the base, or trains it with rounded weights."""
  if arm.technique is None:
    model = learned.attach(setting.base, QatConfig(format=arm.format, group_size=GROUP_SIZE))
    task = Task(objective=Distillation(), references={TEACHER: setting.base})
    config = small_models.fit_config(setting.steps, rate)
    model, trained = small_models.fit(model, setting.data(seed, setting.steps), config, task)
    model = learned.finish(model)
  else:
    step = {arm.technique: {'format': arm.format, 'group_size': GROUP_SIZE}}
    model, trained = small_models.compress(setting.base, step, setting.calibration(seed)), {}
  metrics = {**small_models.quality(setting, model), **trained}
  loss, rounded = metrics[LOSS].value, metrics[LOSS].value
  if arm.technique != NEAREST:
    rounded = small_models.quality(setting, before(f'rtn_{arm.format}'))[LOSS].value
  metrics['recovered'] = small_models.recovered(setting.base_loss, rounded, loss)
  return model, metrics


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
