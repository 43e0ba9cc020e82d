r"""Shows where LoRA learns as well as full fine-tuning, and at how much higher a learning rate.

  python -m experiments.study_adapters --output=experiments/results/study_adapters.jsonl

The base of `small_models`, which was trained on source code, is fine-tuned on Python's
documentation, of which one part is held out. After "LoRA Without Regret" (Schulman et al. 2025,
https://thinkingmachines.ai/blog/lora/). The arms, each with little and with much text:

  full_short, full_long             all parameters
  lora_short, lora_long             LoRA of rank 9 in all linear layers
  attention_short, attention_long   LoRA of rank 26 in the attention layers, as many parameters

The head counts among the linear layers: it is a quarter of this model, and the new text has other
words.

Each is trained at four learning rates, a factor of three apart. The claims, counted over the
seeds, each arm at its best rate but where the text says otherwise:

  L3  with little text, LoRA of all linear layers ends within 2 % of the loss of full fine-tuning,
      also at ten times its best rate; LoRA of the attention layers ends higher; with more text
      LoRA is further behind
  L4  the best rate of LoRA is 4 to 30 times that of full fine-tuning

--steps are the updates with much text; there is a twelfth of it in the short arms. Parts of the
docstrings among the documentation are in the text that the base was trained on, for all arms alike.

Device: any. Minutes: 6 on a GPU, in three processes that share the arms.
"""

import dataclasses

import jax

from experiments import arms, small_models
from experiments.arms import Claim, Options, at_best, ratio, rises
from experiments.small_models import SmallModels
from model import adapters, corpus
from model.adapters import AdapterConfig
from model.eval.records import Metric
from model.train.partition import Selection, partition
from model.train.step import Task
from model.transformer import Transformer

STEPS, SHORTER = 384, 12
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
TENFOLD = 10
LORA_RATES = tuple(TENFOLD * rate for rate in FULL_RATES)
CLOSE = 1.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """What is trained: an adapter, or everything. `part` is the share of the updates: 1 / part."""

  adapter: AdapterConfig | None = None
  part: int = 1


# With these ranks both have 93 thousand parameters, within 0.2 %.
LORA = AdapterConfig(rank=9, alpha=32.0, targets=('*',))
ATTENTION = AdapterConfig(rank=26, alpha=32.0, targets=('layers.*.attention.*',))
LENGTHS = {'short': SHORTER, 'long': 1}
ARMS = {
  f'{name}_{length}': Arm(adapter=adapter, part=part, learning_rates=rates)
  for length, part in LENGTHS.items()
  for name, adapter, rates in (
    ('full', None, FULL_RATES),
    ('lora', LORA, LORA_RATES),
    ('attention', ATTENTION, LORA_RATES),
  )
}
LOSS = 'cross_entropy'


def _tenfold(length: str) -> Claim:
  full, lora = f'full_{length}', f'lora_{length}'

  def holds(runs):
    best = at_best(runs, full)
    rate = min(runs[lora], key=lambda rate: abs(rate / best['learning_rate'] - TENFOLD))
    return runs[lora][rate][LOSS] < CLOSE * best[LOSS]

  text = f'{LOSS}, {lora} at {TENFOLD} times the best rate of {full} < {CLOSE} x {full}'
  return Claim('L3', text, (full, lora), holds)


def _gap_grows() -> Claim:
  names = ('lora_short', 'full_short', 'lora_long', 'full_long')

  def holds(runs):
    lora, full, lora_long, full_long = (at_best(runs, name)[LOSS] for name in names)
    return lora - full < lora_long - full_long

  return Claim('L3', f'{LOSS}, lora - full is larger with more text', names, holds)


CLAIMS = (
  rises('L3', LOSS, ('lora_short', 'full_short'), CLOSE),
  rises('L3', LOSS, ('lora_long', 'full_long'), CLOSE),
  *(_tenfold(length) for length in LENGTHS),
  *(rises('L3', LOSS, (f'lora_{length}', f'attention_{length}')) for length in LENGTHS),
  _gap_grows(),
  *(ratio('L4', 'learning_rate', (f'lora_{n}', f'full_{n}'), 4, 30) for n in LENGTHS),
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=STEPS, texts=corpus.load(corpus.DOCUMENTATION))


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Fine-tunes the base."""
  del before
  model, task = setting.base, Task()
  if arm.adapter is not None:
    model = adapters.attach(model, arm.adapter, key=jax.random.key(seed))
    task = Task(selection=Selection(value=()))
  _, learned, _ = partition(model, task.selection)
  steps = max(2, setting.steps // arm.part)
  config = small_models.fit_config(steps, rate)
  model, trained = small_models.fit(model, setting.data(seed, steps), config, task)
  return model, {
    **small_models.quality(setting, model),
    **trained,
    'base_cross_entropy': Metric(setting.base_loss, 'nat/token', setting.windows.predicted),
    'trained_parameters': Metric(sum(a.size for a in learned.values()), 'parameter'),
  }


STUDY = arms.Study(
  name='study_adapters',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('full_short', 'lora_short'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
