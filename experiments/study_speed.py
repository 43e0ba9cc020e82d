r"""Measures how much faster than the base the smaller models of the studies decode.

  python -m experiments.study_speed --output=experiments/results/study_speed.jsonl

The shapes are those of `study_distillation` and `study_pruning`: without a quarter or half of the
base's layers, or as many parameters of width. Speed does not depend on the values of weights, which
are random here; so each shape is measured once, in interleaved rounds with the base, at batch 1.
The base is small: --width_factor=4 has the same shapes with all widths four times as large.

Device: any. Minutes: below 1 on two CPU cores.
"""

import dataclasses

from absl import flags
from flax import nnx

from experiments import base as embedded
from experiments import common, small_models, study_pruning
from model.compress import recipe, sizes
from model.eval import records, timing
from model.eval.records import Metric, Record
from model.infer import bench
from model.transformer import Transformer

OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
WIDTH = flags.DEFINE_integer('width_factor', 1, 'All widths in times the base.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 15, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny base and few rounds.')

BASE = 'teacher'
PROMPT, DECODED = 128, 64  # tokens


def main() -> None:
  plan = _plan()
  models = _models(plan)
  calls = {
    name: bench.prepare(model, prompt_length=PROMPT, steps=DECODED).decode
    for name, model in models.items()
  }
  rounds = timing.MIN_ROUNDS if SMOKE.value else ROUNDS.value
  for name, timed in timing.time_interleaved(calls, base=BASE, rounds=rounds).items():
    record = _record(plan, name, models[name], timed)
    print(
      f'{name:18} {record.value("parameters"):10,.0f} parameters, decode '
      f'{record.value("decode_tokens_per_s"):7.0f} tokens/s, x {record.value("decode_speedup"):.2f}'
    )
    if OUTPUT.value:
      records.append(OUTPUT.value, record)


def _plan() -> embedded.Plan:
  plan, times = small_models.SMOKE_PLAN if SMOKE.value else small_models.PLAN, WIDTH.value
  wider = ('width', 'query_heads', 'kv_heads', 'ffn_width')
  return dataclasses.replace(plan, **{name: times * getattr(plan, name) for name in wider})


def _models(plan: embedded.Plan) -> dict[str, Transformer]:
  """The base and its smaller shapes, with random weights."""
  build = lambda config: Transformer(config, rngs=nnx.Rngs(0))
  models = {BASE: build(embedded.config(plan))}
  for name, arm in study_pruning.SHAPES.items():
    ((technique, options),) = arm.step.items()
    if arm.like is not None:
      options = options | study_pruning.as_large_as(models[arm.like], models[BASE])
    (step,) = recipe.parse({'name': name, 'steps': [{technique: options}]}).steps
    models[name] = build(step.row.reshapes(models[BASE], step.spec))
  return models


def _record(plan, name: str, model: Transformer, timed: timing.Timing) -> Record:
  return Record(
    experiment='study_speed',
    recipe=name,
    command=common.command(),
    config={
      'teacher': dataclasses.asdict(plan),
      'prompt': PROMPT,
      'decoded': DECODED,
      'layers': len(model.config.layers),
    },
    environment=records.environment(),
    seed=0,
    metrics={
      'parameters': Metric(sizes.total(model), 'parameter'),
      'decode_tokens_per_s': timed.rate(DECODED, 'token/s'),
      'decode_speedup': timed.speedup,
    },
  )


if __name__ == '__main__':
  common.run(main)
