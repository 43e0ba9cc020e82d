r"""Measures a cascade: quality against cost, for each threshold of the small model's doubt.

  python -m experiments.cascade
  python -m experiments.cascade --model=DIR --text=FILE --recipes=int4,gptq_int4 --out=OUT

The large model is --model, and the small ones are its compressed forms. Without it, the large model
is the embedded one after a quarter of its updates (`base.BRIEF`), as training all of them takes
longer than the measurement; --full takes the one of the main job. A request is a piece of
held-out text, and its answer the next tokens, greedily. The quality of an answer is the share of
its tokens, from the first on, that the text has. Half of the requests choose the threshold that
keeps 99 % of the large model's quality at the least cost; the other half measures it.

Costs are seconds of one request, measured with all requests of one model after another through an
engine, in --rounds interleaved rounds; and the bytes that are read to decode a token. A cascade
costs a small answer for each request and a large one for those in doubt.

Prints a table, appends a record of each recipe to --output, and draws OUT/cascade.png.

Device: any. Minutes on two CPU cores: 2 without --model, of which the training, which happens once,
takes one; 5 with a model of 135 million parameters.
"""

import dataclasses
import time

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common, inputs
from model.compress import pipeline, recipe
from model.eval import cascade_figure, cost, records, timing
from model.infer import cascade
from model.infer.engine import Engine
from model.infer.request import Request
from model.transformer import parameters

MODEL = flags.DEFINE_string('model', None, 'The large model; none: the embedded one, in brief.')
FULL = flags.DEFINE_bool('full', False, 'Without --model: the embedded one of the main job.')
TEXT = flags.DEFINE_list('text', [], 'Text of the requests, as of experiments.compress.')
RECIPES = flags.DEFINE_list('recipes', ['int4'], 'Recipes of the small models.')
REQUESTS = flags.DEFINE_integer('requests', 400, 'How many requests.', lower_bound=4)
PROMPT = flags.DEFINE_integer('prompt_tokens', 96, 'Tokens of a prompt.', lower_bound=1)
NEW = flags.DEFINE_integer('new_tokens', 4, 'Tokens of an answer.', lower_bound=1)
SCORE = flags.DEFINE_enum('score', 'logprob', list(cascade.SCORES), 'What doubt is measured by.')
KEPT = flags.DEFINE_float('kept', 0.99, "Share of the large model's quality to keep.", 0.0, 1.0)
SLOTS = flags.DEFINE_integer('slots', 8, 'Requests at once.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds of the timing.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'Record file to append to.')
OUT = common.define_out('out/cascade', 'Folder of the figure.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A few requests to the tiny base model.')


@dataclasses.dataclass(frozen=True)
class Answers:
  """Of all requests, in order: the quality of each answer, and how sure the model was."""

  quality: np.ndarray
  sure: np.ndarray


def main() -> None:
  length = PROMPT.value + NEW.value
  plan = None if SMOKE.value or FULL.value else embedded.BRIEF
  found = inputs.load(MODEL.value, TEXT.value, seed=0, smoke=SMOKE.value, plan=plan)
  count = 8 if SMOKE.value else REQUESTS.value
  work = inputs.make_study(found, inputs.Protocol(seq_len=length, max_windows=count))
  (windows, *_) = work.texts.values()
  rows_BT = np.asarray(windows.tokens_BT)
  models = {'large': found.model}
  for name in RECIPES.value:
    own = recipe.load(common.RECIPES / f'{name}.yaml')
    models[name] = pipeline.compress(found.model, own, work.calibration_BT)[0]
  engines = {name: _engine(one) for name, one in models.items()}
  answers = {name: _answers(engine, rows_BT) for name, engine in engines.items()}  # and compiles
  seconds = {name: [] for name in engines}
  for _ in range(1 if SMOKE.value else ROUNDS.value):
    for name, engine in engines.items():
      start = time.perf_counter()
      _answers(engine, rows_BT)
      seconds[name].append((time.perf_counter() - start) / len(rows_BT))
  measured = [
    _record(name, models, answers, seconds, rows_BT) for name in models if name != 'large'
  ]
  for record, _ in measured:
    print(_words(record))
    if OUTPUT.value is not None:
      records.append(OUTPUT.value, record)
  out = common.out(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  cascade_figure.write(
    {record.recipe: [(p.cost, p.quality) for p in points] for record, points in measured},
    out / 'cascade.png',
  )
  print(out / 'cascade.png')


def _engine(model) -> Engine:
  capacity = PROMPT.value + NEW.value
  return Engine(model, slots=SLOTS.value, capacity=capacity, prefix_bytes=0)


def _answers(engine: Engine, rows_BT) -> Answers:
  """Asks for the ends of the rows."""
  ids, scores, tokens = {}, {}, {}
  for b, row in enumerate(rows_BT):
    prompt = row[: PROMPT.value].tolist()
    request = Request(prompt=prompt, max_new_tokens=NEW.value, logprobs=2, ignore_eos=True)
    ids[engine.add(request)], scores[b], tokens[b] = b, [], []
  while engine.busy:
    for progress in engine.step():
      scores[ids[progress.request]] += progress.logprobs
      tokens[ids[progress.request]] += progress.tokens
  right = np.asarray([tokens[b] for b in range(len(rows_BT))]) == rows_BT[:, PROMPT.value :]
  quality = np.cumprod(right, axis=1).mean(1)
  sure = [cascade.SCORES[SCORE.value](scores[b]) for b in range(len(rows_BT))]
  return Answers(quality, np.asarray(sure))


def _record(name, models, answers, seconds, rows_BT) -> tuple[records.Record, list[cascade.Point]]:
  small, large = answers[name], answers['large']
  costs = {one: float(np.median(seconds[one])) for one in (name, 'large')}
  curve = lambda part: cascade.curve(
    small.sure[part],
    small.quality[part],
    large.quality[part],
    small_cost=costs[name] / costs['large'],
  )
  chosen = cascade.threshold(curve(np.s_[0::2]), KEPT.value)
  points = curve(np.s_[1::2])
  reached = next(point for point in points if point.threshold >= chosen.threshold)
  bytes_of = lambda one: cost.decode_bytes_per_token(
    models[one].config,
    {path: value.get_value() for path, value in parameters(models[one]).items()},
    context=PROMPT.value,
  )
  half = len(rows_BT) // 2
  metrics = {
    'large quality': records.Metric(points[-1].quality, '1', half),
    'small quality': records.Metric(points[0].quality, '1', half),
    'cascade quality': records.Metric(reached.quality, '1', half),
    'deferred': records.Metric(reached.deferred, '1', half),
    'speedup': timing.summarize(
      np.divide(
        seconds['large'], np.add(seconds[name], reached.deferred * np.asarray(seconds['large']))
      ),
      '1',
    ),
    'threshold': records.Metric(chosen.threshold, 'nats'),
    'bytes read, of the large': records.Metric(
      bytes_of(name) / bytes_of('large') + reached.deferred, '1'
    ),
  }
  record = records.Record(
    experiment='cascade',
    recipe=name,
    command=common.command(),
    config={
      'model': MODEL.value or ('embedded' if FULL.value else 'embedded, in brief'),
      'text': TEXT.value,
      'requests': len(rows_BT),
      'prompt_tokens': PROMPT.value,
      'new_tokens': NEW.value,
      'score': SCORE.value,
      'kept': KEPT.value,
      'slots': SLOTS.value,
      'curve': [dataclasses.astuple(point)[1:] for point in points[:: max(1, len(points) // 40)]],
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
  )
  return record, points


def _words(record: records.Record) -> str:
  value = record.value
  return (
    f'{record.recipe}: alone {value("small quality"):.1%} against {value("large quality"):.1%} of '
    f'the tokens right; with {value("deferred"):.0%} deferred {value("cascade quality"):.1%}, '
    f'{value("speedup"):.2f} times the speed'
  )


if __name__ == '__main__':
  common.run(main)
