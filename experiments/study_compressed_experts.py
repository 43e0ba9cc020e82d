r"""Shows what compression costs a small trained model with experts, and which method costs less.

  python -m experiments.study_compressed_experts \
      --output=experiments/results/study_compressed_experts.jsonl

A model of the shape of the base of `small_models`, with eight experts in every layer and two per
token, is trained from scratch on the same text with balance losses, once for each seed, and kept in
the cache folder. The arms:

  base                      that model
  rtn_int4, gptq_int4, ...  all matrices but the routers in a format, in groups of 32
  reap25, frequency25, ...  a quarter or half of the experts removed, by REAP, by how many tokens
                            choose them, or at random
  merge25, merge50          as many merged into others

`experts_changed` is the share of tokens whose set of experts is not that of the base, over all
layers; a token that chose an expert that was removed has changed. The claims, counted over the
seeds:

  C1  GPTQ costs less than rounding, and changes the experts of fewer tokens
  C2  pruning by REAP costs less than by frequency, and either less than at random

Device: any. Minutes: 6 on a GPU, a seed a process.
"""

import dataclasses
import hashlib
import json

import numpy as np
from flax import nnx

from experiments import arms, common, small_models
from experiments import base as embedded
from experiments.arms import Options, rises
from experiments.small_models import SmallModels
from model import fingerprint, hf
from model.eval import routing
from model.eval.records import Metric
from model.train.routing import Balanced
from model.train.step import Task
from model.transformer import Transformer

STEPS = 500
RATE = small_models.PLAN.learning_rate
GROUP_SIZE = 32
FORMATS = ('int4', 'int3')
TECHNIQUES = {'rtn': 'round_to_nearest', 'gptq': 'gptq'}
SCORES = ('reap', 'frequency', 'random')
SHARES = {'25': 0.25, '50': 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """The step of a recipe that the trained model goes through, if any."""

  step: dict[str, dict] | None = None


QUANTIZED = {
  f'{name}_{number_format}': Arm(step={row: {'format': number_format, 'group_size': GROUP_SIZE}})
  for number_format in FORMATS
  for name, row in TECHNIQUES.items()
}
PRUNED = {
  f'{score}{share}': Arm(step={'prune_experts': {'ratio': ratio, 'score': score}})
  for share, ratio in SHARES.items()
  for score in SCORES
}
MERGED = {f'merge{s}': Arm(step={'merge_experts': {'ratio': r}}) for s, r in SHARES.items()}
ARMS = {'base': Arm()} | QUANTIZED | PRUNED | MERGED
LOSS, CHANGED = 'cross_entropy', 'experts_changed'
CLAIMS = (
  *(
    rises('C1', metric, (f'gptq_{number_format}', f'rtn_{number_format}'))
    for metric in (LOSS, CHANGED)
    for number_format in FORMATS
  ),
  *(
    rises('C2', LOSS, (f'{a}{share}', f'{b}{share}'))
    for share in SHARES
    for a, b in (('reap', 'frequency'), ('reap', 'random'), ('frequency', 'random'))
  ),
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=STEPS, rate=RATE)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Compresses the trained model of this seed, and measures what is left."""
  del rate
  if arm.step is None:
    model = _trained(setting, seed)
    return model, _measure(setting, model)
  base = before('base')
  ((technique, options),) = arm.step.items()
  if options.get('score') == 'random':
    options = {**options, 'seed': seed}
  model = small_models.compress(base, {technique: options}, setting.calibration(seed))
  own, others = (routing.chosen(one, setting.windows) for one in (model, base))
  share = routing.changed_share(model, own, base, others)
  changed = {} if share is None else {CHANGED: Metric(share, '1', setting.windows.tokens_BT.size)}
  return model, {**_measure(setting, model), **changed}


def _measure(setting, model) -> dict[str, Metric]:
  found = small_models.quality(setting, model)
  loss = found[LOSS]
  return {**found, 'ppl': Metric(float(np.exp(loss.value)), '1', loss.n)}


def _trained(setting: SmallModels, seed: int) -> Transformer:
  """The model with experts of one seed, from the cache folder or trained now."""
  what = {'plan': dataclasses.asdict(setting.plan), 'steps': setting.steps, 'seed': seed}
  what |= {'rate': RATE, 'tokenizer': fingerprint.of_model(setting.base)}
  what |= {'text': setting.texts.fingerprint}
  digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
  folder = common.cache_folder() / f'routed-{digest}'
  if (folder / 'config.json').is_file():
    return hf.load_pretrained(folder)[0]
  config = small_models.routed(embedded.config(setting.plan, setting.tokenizer))
  model, _ = small_models.fit(
    Transformer(config, rngs=nnx.Rngs(seed)),
    setting.data(seed, setting.steps),
    small_models.fit_config(setting.steps, RATE),
    Task(objective=Balanced()),
  )
  hf.save_pretrained(model, setting.tokenizer, folder)
  return model


STUDY = arms.Study(
  name='study_compressed_experts',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('base', 'gptq_int3', 'reap50'),
  prepare=prepare,
  train=train,
)

if __name__ == '__main__':
  arms.main(STUDY)
