r"""Shows what healing brings back after structured pruning, and whether width or depth should go.

  python -m experiments.study_pruning --output=experiments/results/study_pruning.jsonl
  python -m experiments.study_pruning --output=experiments/results/study_pruning.jsonl \
      --arms=channels25_kd_5,channels25_ce_5 --learning_rates=5e-4,1e-3,2e-3

The base of `small_models` loses one of these, and is not trained (the arm of that name):

  channels25, width25    25 % of the feed-forward channels; of all parameters by residual width
  layers_quarter, channels_quarter, width_quarter   a quarter of the layers, or at least as many
                         parameters by feed-forward channels or by residual width
  layers_half, channels_half, width_half            likewise half of the layers

and is healed with as many tokens as 5 or 16 % (the shapes: 16 %) of those that the base was trained
on: by distillation from the base (channels25_kd_5) or by the cross entropy of the text
(channels25_ce_5). Each seed has its own calibration rows, passages and order. `recovered` is the
share of the lost loss, in nats per token of held-out text, that came back. The claims, counted over
the seeds:

  P1  5 % of the tokens bring at least 60 % back, and distillation no less than cross entropy
  P2  at as many parameters, removing width costs less loss than removing depth, healed or not

--steps are the updates that the shares are of; by default those of the base. How much faster the
pruned shapes decode is in the records of `study_speed`.

Device: any. Minutes: 6 on a GPU, in five processes that share the arms.
"""

import dataclasses
from typing import Literal

from experiments import arms, small_models
from experiments.arms import Options, at_least, rises
from experiments.small_models import SmallModels
from model.compress import sizes
from model.eval.records import Metric
from model.train.distill import TEACHER, Distillation
from model.train.objectives import CrossEntropy
from model.train.step import Task
from model.transformer import Transformer

SHARES = (5, 16)  # per cent of the base's tokens
RATES = {'kd': (3e-4, 1e-3), 'ce': (1e-4, 3e-4)}  # around the best ones of a few updates
Healing = Literal['kd', 'ce']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """A pruned model, healed if `share` is above 0.

  step: the technique and its options, of an arm that is pruned here.
  like: an arm whose number of parameters is the most that may stay.
  start: the arm that is healed.
  """

  step: dict[str, dict] | None = None
  like: str | None = None
  start: str | None = None
  healing: Healing = 'kd'
  share: int = 0  # per cent of the base's tokens


CUTS = {
  'channels25': Arm(step={'prune_ffn': {'ratio': 0.25}}),
  'width25': Arm(step={'prune_width': {'parameters': 0.75, 'multiple': 4}}),
}
HEALED = {
  f'{cut}_{healing}_{share}': Arm(start=cut, healing=healing, share=share, learning_rates=rates)
  for cut in CUTS
  for healing, rates in RATES.items()
  for share in SHARES
}
SIZES = {'quarter': 0.25, 'half': 0.5}
KINDS = {'channels': {'prune_ffn': {'multiple': 8}}, 'width': {'prune_width': {'multiple': 2}}}
SHAPES = {f'layers_{size}': Arm(step={'drop_layers': {'ratio': r}}) for size, r in SIZES.items()}
SHAPES |= {
  f'{kind}_{size}': Arm(step=step, like=f'layers_{size}')
  for size in SIZES
  for kind, step in KINDS.items()
}
HEALED_SHAPES = {
  f'{shape}_kd_{SHARES[-1]}': Arm(start=shape, share=SHARES[-1], learning_rates=RATES['kd'])
  for shape in SHAPES
}
ARMS = CUTS | HEALED | SHAPES | HEALED_SHAPES

LOSS = 'cross_entropy'
CLAIMS = (
  *(at_least('P1', 'recovered', f'{cut}_kd_5', 0.6) for cut in CUTS),
  *(
    rises(f'P1, {share} %', LOSS, (f'{cut}_kd_{share}', f'{cut}_ce_{share}'))
    for cut in CUTS
    for share in SHARES
  ),
  *(
    rises(f'P2, {size}, {when}', LOSS, (f'{kind}_{size}{end}', f'layers_{size}{end}'))
    for size in SIZES
    for kind in KINDS
    for when, end in (('not healed', ''), ('healed', f'_kd_{SHARES[-1]}'))
  ),
)


def prepare(options: Options) -> SmallModels:
  plan = small_models.SMOKE_PLAN if options.smoke else small_models.PLAN
  return small_models.prepare(options, steps=plan.steps)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Prunes the base, or heals another arm's model, and measures the result."""
  if arm.start is None:
    pruned = _pruned(setting, arm, seed, before)
    return pruned, _measure(setting, pruned)
  steps = max(2, round(arm.share / 100 * setting.steps))
  task = Task(objective=CrossEntropy())
  if arm.healing == 'kd':
    task = Task(objective=Distillation(), references={TEACHER: setting.base})
  start = before(arm.start)
  config = small_models.fit_config(steps, rate)
  model, trained = small_models.fit(start, setting.data(seed, steps), config, task)
  metrics = {**_measure(setting, model), **trained}
  lost = small_models.quality(setting, start)[LOSS].value
  recovered = small_models.recovered(setting.base_loss, lost, metrics[LOSS].value)
  return model, {**metrics, 'recovered': recovered}


def _pruned(setting, arm, seed, before) -> Transformer:
  ((technique, options),) = arm.step.items()
  if arm.like is not None:
    options = options | as_large_as(before(arm.like), setting.base)
  return small_models.compress(setting.base, {technique: options}, setting.calibration(seed))


def as_large_as(model: Transformer, base: Transformer) -> dict[str, float]:
  """The option of a technique by which at most as many parameters of the base stay."""
  return {'parameters': sizes.total(model) / sizes.total(base)}


def _measure(setting: SmallModels, model: Transformer) -> dict[str, Metric]:
  return {
    **small_models.quality(setting, model),
    'base_cross_entropy': Metric(setting.base_loss, 'nat/token', setting.windows.predicted),
    'parameters': Metric(sizes.total(model), 'parameter'),
    'parameters_kept': Metric(sizes.total(model) / sizes.total(setting.base), '1'),
  }


STUDY = arms.Study(
  name='study_pruning',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('channels_quarter_kd_16', 'layers_quarter_kd_16'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
