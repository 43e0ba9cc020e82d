r"""Measures what a long text costs and how well it is read, by context, mixer and cache.

  python -m experiments.long_context
  python -m experiments.long_context --contexts=1024,4096,16384,65536 --mixers=window1024 \
    --kv_caches=float,int8 --output=out/long.jsonl --figure=out/long.png

A preset has random weights; only time and memory are measured. Models of yours are measured as they
are, or with other mixers, and with --text their quality is, too:

  python -m experiments.long_context --model=DIR --mixers=dense,window512+first4,window512 \
    --full_every=4 --text=python-docs --contexts=2048,8192,12288 --kv_caches=float
  python -m experiments.long_context --model=DIR,OUT/models/windows512 --text=FILE --nocosts

The mixers:

  own               those of the model
  dense             every query sees all tokens before it
  window1024        every query of every layer sees 1,024 tokens, itself included, and the cache
                    holds no more; other sparse patterns, joined by +, are in ops/patterns.py.
                    With --full_every=4 the last of every four layers stays dense
  moba64x4          every query chooses 4 blocks of 64 tokens besides its own; with moba64x4+first
                    one of them is the first. The cache holds all tokens, in a float format.
                    Likewise with --full_every

Costs: rounds are interleaved among the models, mixers and caches of a context. `prefill` reads a
prompt that is as long as the context, `decode` writes --tokens tokens after it. Memory is the
compiled programs' own account, with the weights. A peer (experiments/peer_command.py) is timed in
each round, too, in a process of its own:

  python -m experiments.long_context --model=DIR --contexts=16384 --phase=decode --kv_caches=int8 \
    --peer='python -m experiments.peers.llama_cpp_speed --model=FILE.gguf --formats=q8_0 \
    --kv_cache=q8_0 --read=1024'

Quality (experiments/long_quality.py), on the held-out part of the text: the perplexity of the
tokens from the context before to this one, and how likely the right words of needles are.

Device: any. Minutes: 6 on two CPU cores with the defaults, some 40 with a model of 135 M.
"""

import collections
import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import common, long_quality, mixers, peer_command, shapes
from experiments.long_quality import Probe
from model import cache_spec, presets, rounds, units
from model.config import ModelConfig
from model.eval import long_figure, records, timing
from model.eval.records import Metric, Record
from model.infer import bench
from model.infer.bench import Bench
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.shared import SharedConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, parameters

PHASE_NAMES = ('prefill', 'decode')
SHAPE = shapes.define()
CONTEXTS = flags.DEFINE_list('contexts', ['1024', '4096', '16384'], 'Tokens of the prompts.')
MODEL = flags.DEFINE_list(
  'model', [], 'Folders, hub ids or .gguf files, in place of a preset with random weights.'
)
MIXERS = flags.DEFINE_list(
  'mixers',
  None,
  'own, dense, sparse patterns or moba64x4. Default: own with --model, else dense and window1024.',
)
FULL_EVERY = flags.DEFINE_integer(
  'full_every', None, 'With another mixer, one of so many layers stays dense.', lower_bound=2
)
TEXT = flags.DEFINE_string(
  'text', None, 'Text file or folder, python-source or python-docs: measures quality on it.'
)
TEXTS = flags.DEFINE_integer('texts', 1, 'Texts of the longest context to predict.', lower_bound=1)
HAYSTACKS = flags.DEFINE_integer(
  'haystacks', 2, 'Texts of each context with needles.', lower_bound=0
)
NEEDLES = flags.DEFINE_list(
  'needles', None, 'Lengths of the texts with needles, of --contexts. Default: all of them.'
)
COSTS = flags.DEFINE_bool('costs', True, 'Measure time and memory.')
PHASES = flags.DEFINE_multi_enum('phase', ['prefill', 'decode'], PHASE_NAMES, 'What is timed.')
CACHES = flags.DEFINE_list('kv_caches', ['float', 'int8'], f'Of {cache_spec.FORMS}.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of the model.')
PEERS = flags.DEFINE_multi_string(
  'peer', [], 'A command to time in every round with --prompt=CONTEXT; may be repeated.'
)
TOKENS = flags.DEFINE_integer('tokens', 32, 'Tokens to decode per round.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
FIGURE = flags.DEFINE_string('figure', None, 'A PNG to draw the costs over the context into.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny model and short texts.')


OWN, DENSE = 'own', 'dense'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model whose layers have one mixer, with one format of its cache."""

  model: str
  mixer: str
  kv_cache: str
  context: int

  @property
  def variant(self) -> str:
    """The model and its mixer, as far as they differ among the cases."""
    pattern = self.mixer not in (OWN, DENSE)
    layers = (
      f' in {FULL_EVERY.value - 1} of {FULL_EVERY.value}' if pattern and FULL_EVERY.value else ''
    )
    several = len(MODEL.value) > 1 or self.mixer == OWN
    names = [pathlib.Path(self.model).name] if several else []
    return ' '.join([*names, *([] if self.mixer == OWN else [self.mixer + layers])])

  @property
  def label(self) -> str:
    return f'{self.variant}, {self.kv_cache}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Where the models come from: configs, and weights where there are some."""

  config: ModelConfig
  weights: Transformer | None = None
  tokenizer: Tokenizer | None = None

  def variant(self, case: Case, longest: int) -> Transformer:
    """The model with the mixer of a case, and positions for the longest text."""
    config = _mixed(self.config, case.mixer)
    config = config.replace(max_positions=max(config.max_positions, longest))
    if self.weights is None:
      return Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(DTYPE.value))
    if self.weights.positions is not None:  # learned ones end where they end
      config = config.replace(max_positions=self.config.max_positions)
    values = {path: param.get_value() for path, param in parameters(self.weights).items()}
    return units.build(config, values, self.weights.dtype)


def main() -> None:
  cases, sources = _cases(), _sources()
  probe = _probe(sources, cases)
  quality = _qualities(sources, cases, probe)
  found = []
  for _, of_one in itertools.groupby(cases, lambda case: case.context):
    found += _measure(sources, list(of_one), quality, {} if probe is None else probe.about)
  if FIGURE.value:
    long_figure.write(found, FIGURE.value)


def _sources() -> dict[str, Source]:
  if not MODEL.value:
    name = 'tiny-llama' if SMOKE.value else SHAPE['preset'].value
    return {name: Source(config=presets.preset(name) if SMOKE.value else shapes.config(SHAPE))}
  loaded = {name: common.load_model(name, jnp.dtype(DTYPE.value)) for name in MODEL.value}
  return {
    name: Source(config=model.config, weights=model, tokenizer=tokenizer)
    for name, (model, tokenizer) in loaded.items()
  }


def _cases() -> list[Case]:
  contexts = ['32', '64'] if SMOKE.value and not MODEL.value else CONTEXTS.value
  usual = [OWN] if MODEL.value else [DENSE, 'window8' if SMOKE.value else 'window1024']
  mixed = MIXERS.value or usual
  lengths = _lengths('contexts', contexts)
  for name in mixed:
    if name not in (OWN, DENSE):
      _check_name(name)
  for name in CACHES.value:
    cache_spec.of(name)
  if TEXT.value and not MODEL.value:
    raise ValueError('--text needs a --model; random weights predict nothing')
  if not (COSTS.value or TEXT.value):
    raise ValueError('--nocosts without --text measures nothing')
  names = MODEL.value or ['tiny-llama' if SMOKE.value else SHAPE['preset'].value]
  caches = CACHES.value if COSTS.value else CACHES.value[:1]
  product = itertools.product(lengths, names, mixed, caches)
  return [Case(context=n, model=one, mixer=m, kv_cache=name) for n, one, m, name in product]


def _lengths(flag: str, words: list[str]) -> list[int]:
  try:
    lengths = sorted(map(int, words))
  except ValueError:
    raise ValueError(f'--{flag} must be integers, not {",".join(words)}') from None
  for length in lengths:
    common.check_positive(**{flag: length})
  return lengths


def _mixed(config: ModelConfig, mixer: str) -> ModelConfig:
  """The config with another mixer. Raises ValueError for layers that are no attention."""
  if mixer == OWN:
    return config
  layers = list(config.layers)
  for l, layer in enumerate(layers):
    if type(layer.mixer) not in (AttentionConfig, SharedConfig):
      kind = type(layer.mixer).__name__
      raise ValueError(f'the mixer of layer {l} is a {kind}, so --mixers can only be own')
    full = mixer == DENSE or (FULL_EVERY.value and l % FULL_EVERY.value == FULL_EVERY.value - 1)
    dense = dataclasses.replace(layer.mixer, window=None, sparse=None)
    layers[l] = dataclasses.replace(layer, mixer=dense if full else mixers.sees(mixer, dense))
  return config.replace(layers=tuple(layers))


def _probe(sources, cases) -> Probe | None:
  """What quality is measured on. All models have the tokens of the first."""
  if TEXT.value is None:
    return None
  first = next(iter(sources.values()))
  for name, source in sources.items():
    if source.config.vocab_size != first.config.vocab_size:
      raise ValueError(
        f'{name} has a vocabulary of {source.config.vocab_size}, the first model one of '
        f'{first.config.vocab_size}; only models with the same tokens can be compared'
      )
  contexts = sorted({case.context for case in cases})
  hidden_in = contexts if NEEDLES.value is None else _lengths('needles', NEEDLES.value)
  if not set(hidden_in) <= set(contexts):
    raise ValueError(f'--needles={",".join(NEEDLES.value)} are not all of --contexts')
  return long_quality.probe(
    TEXT.value,
    first.tokenizer,
    first.config,
    contexts,
    rows=TEXTS.value,
    haystacks=dict.fromkeys(hidden_in, HAYSTACKS.value),
  )


def _qualities(sources, cases: list[Case], probe: Probe | None) -> dict:
  """The metrics of each model, mixer and context."""
  found, longest = {}, max(case.context for case in cases)
  for case in cases if probe is not None else ():
    key = case.model, case.mixer
    if key not in found:
      model = sources[case.model].variant(case, longest)
      found[key] = long_quality.measure(model, probe, case.variant)
  return found


def _check_name(name: str) -> None:
  try:
    mixers.sees(name, AttentionConfig(query_heads=1, kv_heads=1, head_width=1))
  except ValueError as error:
    raise ValueError(f'--mixers: {error}; or own or dense') from None


def _measure(sources, cases: list[Case], quality, about: dict) -> list[Record]:
  """Times all cases of one context in turn."""
  longest = cases[0].context + TOKENS.value
  benches = (
    {case: _bench(sources[case.model].variant(case, longest), case) for case in cases}
    if COSTS.value
    else {}
  )
  calls = {
    (case, phase): getattr(one, phase) for case, one in benches.items() for phase in PHASES.value
  }
  for call in calls.values():
    for _ in range(rounds.MIN_WARMUP if cases[0].context < 4096 else 1):
      jax.block_until_ready(call())
  samples, lines = {key: [] for key in calls}, []
  for _ in common.progress(range(ROUNDS.value if calls else 0), f'{cases[0].context} tokens'):
    for key, call in calls.items():
      samples[key].append(rounds.seconds(call))
    for command in PEERS.value:
      lines += peer_command.run(f'{command} --prompt={cases[0].context}')
  found = []
  for case in cases:
    metrics = _costs(case, benches[case], samples, cases[0]) if benches else {}
    if case.kv_cache == 'float':  # quality is that of the model without a cache
      metrics |= quality.get((case.model, case.mixer), {}).get(case.context, {})
    record = _record(case, metrics, sources[case.model].config, cases[0], about)
    found.append(record)
  found += _peer_records(lines, cases[0].context)
  for record in found:
    print(_words(record), flush=True)
    if OUTPUT.value:
      records.append(OUTPUT.value, record)
  return found


def _peer_records(lines: list[dict], context: int) -> list[Record]:
  """One for each configuration of the peers, over the rounds; the phases of PHASES alone."""
  found = collections.defaultdict(list)
  for line in lines:
    found[f'{line["peer"]} {line["weights"]}'].append(line)
  rates = [f'{phase}_tokens_per_s' for phase in PHASES.value]
  return [
    Record(
      experiment='long_context peer',
      recipe=name,
      command=common.command(),
      config={key: value for key, value in of_one[0].items() if not key.endswith('_per_s')}
      | {'context': context, 'peers': list(PEERS.value)},
      environment=records.environment(),
      seed=None,
      metrics={
        rate: timing.summarize(np.array([one[rate] for one in of_one]), 'token/s') for rate in rates
      },
    )
    for name, of_one in found.items()
  ]


def _bench(model: Transformer, case: Case) -> Bench:
  return bench.prepare(
    model,
    prompt_length=case.context,
    steps=4 if SMOKE.value else TOKENS.value,
    cache_format=case.kv_cache,
  )


def _costs(case: Case, own: Bench, samples, base: Case) -> dict[str, Metric]:
  metrics = {
    'cache_bytes': Metric(own.cache_bytes, 'byte'),
    'prefill_peak_bytes': Metric(own.prefill_peak_bytes, 'byte'),
    'decode_peak_bytes': Metric(own.decode_peak_bytes, 'byte'),
  }
  for phase in PHASES.value:
    seconds = np.array(samples[case, phase])
    tokens = case.context if phase == 'prefill' else own.steps
    metrics |= {
      f'{phase}_s': timing.summarize(seconds, 's'),
      f'{phase}_tokens_per_s': timing.summarize(tokens / seconds, 'token/s'),
      f'{phase}_speedup': timing.summarize(np.divide(samples[base, phase], seconds), '1'),
    }
  return metrics


def _record(case: Case, metrics, config: ModelConfig, base: Case, about: dict) -> Record:
  return Record(
    experiment='long_context',
    recipe=case.label,
    command=common.command(),
    config={
      **dataclasses.asdict(case),
      **about,
      'full_every': FULL_EVERY.value,
      'layers': len(config.layers),
      'dtype': DTYPE.value,
      'tokens': 4 if SMOKE.value else TOKENS.value,
      'base': base.label,
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
  )


def _words(record: Record) -> str:
  value, words = record.value, [f'{record.config["context"]:>6} tokens, {record.recipe:<18}']
  if record.experiment.endswith('peer'):
    speeds = [f'{name.split("_")[0]} {m.value:.1f} tokens/s' for name, m in record.metrics.items()]
    return ', '.join([*words, *speeds])
  if 'prefill_s' in record.metrics:
    words.append(f'prefill {value("prefill_s"):8.3f} s ({value("prefill_speedup"):.2f} x)')
  if 'decode_s' in record.metrics:
    speed = value('decode_tokens_per_s')
    words.append(f'decode {speed:7.1f} tokens/s ({value("decode_speedup"):.2f} x)')
  if 'cache_bytes' in record.metrics:
    words += [
      f'cache {value("cache_bytes") / 1e6:8.1f} MB',
      f'prefill holds {value("prefill_peak_bytes") / 1e6:8.1f} MB',
    ]
  if 'ppl' in record.metrics:
    words.append(f'perplexity up to here {value("ppl"):.3f}')
  if 'needle_probability' in record.metrics:
    words.append(f'needle {value("needle_probability"):.3f}, found {value("needle_found"):.0%}')
  return ', '.join(words)


if __name__ == '__main__':
  common.run(main)
