r"""Times speculative decoding beside decoding without it, one request at a time.

  python -m experiments.benchmark_speculation --model=DIR --recipe=bf16 --drafts=n-grams,int4

The prompts are pieces of held-out text, by default of Python's standard library, and the answers
are greedy. Drafts are n-grams of the text, or compressed forms of the model by the names of their
recipes. All engines answer the same prompts in turn, in --rounds interleaved rounds, after one that
compiles and in which each learns whether its draft pays; that speculation turns itself off where it
loses is part of what is measured, unless --always is given. That all of them give the same tokens
is checked.

Prints a line for each draft and appends a record to --output.

Device: any. Minutes: 5 on two CPU cores, with a model of 135 million parameters.
"""

import time

import numpy as np
from absl import flags

from experiments import common, inputs
from model import corpus
from model.compress import pipeline, recipe
from model.eval import records, timing
from model.infer.engine import Engine
from model.infer.request import Request
from model.infer.speculation import Speculation

MODEL = flags.DEFINE_string('model', None, 'Model to decode with; none: the embedded one.')
TEXT = flags.DEFINE_list('text', None, 'Texts of the prompts, as of experiments.compress.')
RECIPE = flags.DEFINE_string('recipe', None, 'Recipe that the model is compressed by first.')
DRAFTS = flags.DEFINE_list('drafts', ['n-grams', 'int4'], 'n-grams, or recipes of draft models.')
TOKENS = flags.DEFINE_integer('tokens', 4, 'Tokens that a draft proposes at a time.', lower_bound=1)
PROMPTS = flags.DEFINE_integer('prompts', 6, 'How many prompts.', lower_bound=1)
PROMPT = flags.DEFINE_integer('prompt_tokens', 256, 'Tokens of a prompt.', lower_bound=1)
NEW = flags.DEFINE_integer('new_tokens', 128, 'Tokens of an answer.', lower_bound=2)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=1)
ALWAYS = flags.DEFINE_bool('always', False, 'Speculate also where it loses.')
OUTPUT = flags.DEFINE_string('output', None, 'Record file to append to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A few tokens of the tiny base model.')

WITHOUT = 'without'


def main() -> None:
  prompts = 2 if SMOKE.value else PROMPTS.value
  new = 12 if SMOKE.value else NEW.value
  texts = TEXT.value if TEXT.value is not None else [corpus.SOURCE] * (MODEL.value is not None)
  found = inputs.load(MODEL.value, texts, seed=0, smoke=SMOKE.value)
  work = inputs.make_study(found, inputs.Protocol(seq_len=PROMPT.value, max_windows=prompts))
  (windows, *_) = work.texts.values()
  model = _compressed(found.model, RECIPE.value, work) if RECIPE.value else found.model
  requests = [
    Request(prompt=row.tolist(), max_new_tokens=new, ignore_eos=True)
    for row in np.asarray(windows.tokens_BT)
  ]
  engines = {WITHOUT: _engine(model, None)}
  for name in DRAFTS.value:
    draft = None if name == 'n-grams' else _compressed(found.model, name, work)
    own = Speculation(draft=draft, tokens=TOKENS.value, always=ALWAYS.value)
    engines[name] = _engine(model, own)
  answers = {name: engine.run(requests) for name, engine in engines.items()}
  for name, own in answers.items():
    same = np.mean([a == b for a, b in zip(own, answers[WITHOUT])])
    print(f'{name}: {same:.0%} of the answers are those without a draft')
  seconds = {name: [] for name in engines}
  before = {name: (e.metrics.drafted, e.metrics.accepted) for name, e in engines.items()}
  for _ in range(1 if SMOKE.value else ROUNDS.value):
    for name, engine in engines.items():
      start = time.perf_counter()
      engine.run(requests)
      seconds[name].append(time.perf_counter() - start)
  for name in DRAFTS.value:
    metrics = engines[name].metrics
    drafted, accepted = metrics.drafted - before[name][0], metrics.accepted - before[name][1]
    record = _record(name, seconds, drafted, accepted, len(requests) * new)
    print(_words(record))
    if OUTPUT.value is not None:
      records.append(OUTPUT.value, record)


def _compressed(model, name, work):
  own = recipe.load(common.RECIPES / f'{name}.yaml')
  return pipeline.compress(model, own, work.calibration_BT)[0]


def _engine(model, speculation) -> Engine:
  capacity = PROMPT.value + NEW.value
  return Engine(model, slots=1, capacity=capacity, prefix_bytes=0, speculation=speculation)


def _record(name, seconds, drafted, accepted, tokens) -> records.Record:
  own, without = np.asarray(seconds[name]), np.asarray(seconds[WITHOUT])
  metrics = {
    'speedup': timing.summarize(without / own, '1'),
    'tokens_per_s': timing.summarize(tokens / own, 'tokens/s'),
    'tokens_per_s_without': timing.summarize(tokens / without, 'tokens/s'),
  }
  if drafted:
    metrics['acceptance'] = records.Metric(accepted / drafted, '1', drafted)
  return records.Record(
    experiment='benchmark_speculation',
    recipe=name,
    command=common.command(),
    config={
      'model': MODEL.value or 'embedded',
      'target': RECIPE.value or 'as it is',
      'tokens': TOKENS.value,
      'prompts': PROMPTS.value,
      'prompt_tokens': PROMPT.value,
      'new_tokens': NEW.value,
      'always': ALWAYS.value,
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
  )


def _words(record: records.Record) -> str:
  speedup, value = record.metrics['speedup'], record.value
  taken = value('acceptance')
  return (
    f'{record.recipe}: {speedup.value:.2f} ± {(speedup.spread or 0) / 2:.2f} times the speed '
    f'without, {value("tokens_per_s"):.0f} against {value("tokens_per_s_without"):.0f} tokens/s, '
    + ('nothing drafted' if taken is None else f'{taken:.0%} of the proposals taken')
  )


if __name__ == '__main__':
  common.run(main)
