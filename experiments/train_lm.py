r"""Trains a language model from scratch and measures its perplexity on unseen text.

With no flags it trains the small base model of `experiments.compress` on the source of Python's
standard library, with its own tokenizer:

  python -m experiments.train_lm --out=out/lm

On a text of yours (a file, or a folder of .txt, .md, .py and .jsonl files), a larger model:

  python -m experiments.train_lm --text=DIR --tokenizer=DIR --width=768 --layers=12 \
      --query_heads=12 --kv_heads=4 --ffn_width=2048 --batch_size=64 --seq_len=1024 \
      --steps=20000 --learning_rate=6e-4 --dtype=bfloat16 --accumulation=4 --out=out/lm

With experts in every layer, of which each token goes through two and through a shared one:

  python -m experiments.train_lm --experts=8 --experts_per_token=2 --shared_experts=1

The experts are kept in use by balance losses; with --balancing=bias by a bias of the choice that
each update moves, with --balancing=none by nothing. On several devices, the experts can be divided
among those of a mesh axis:

  python -m experiments.train_lm --experts=8 --mesh_data=2 --mesh_expert=4 \
      --expert_dispatch=all_to_all --capacity_factor=1.25

With a gated DeltaNet in three of four layers and attention in the fourth; other mixers are linear,
retnet, gla, linformer and linformer_dynamic, sparse patterns such as window128+first4, and
moba64x4, with which each query chooses 4 blocks of 64 tokens. Documents that share a row see each
other in linformer, whose chunks begin with the row. Without --attention_every all layers have them:

  python -m experiments.train_lm --layers=4 --mixer=gated_delta --attention_every=4

OUT/model is a Hugging Face folder of the Llama family, with experts of the Mixtral family, which
`experiments.compress --model` and transformers load; with shared experts, or with one expert per
token, or with biases of the choice, or with other mixers, it is in the format of Lissom. OUT/run
holds checkpoints, and the loss and the use of experts of every update (loss.jsonl), which
OUT/loss.png and OUT/experts.png show. A killed run that is started again with the same flags
resumes and ends with the same bits. OUT/records.jsonl gets one line per run.

Device: any. Minutes: 2 with the defaults on two CPU cores. Expect about 2 bits per byte of held-out
text with the defaults.
"""

import dataclasses
import time
from typing import get_args

from absl import flags
from flax import nnx

from experiments import base as embedded
from experiments import common, mixers, training
from model import corpus, expert_parallel, hf
from model import tokenizer as tokenizer_lib
from model.eval import cost, experts_figure, loss_figure, perplexity, records
from model.expert_parallel import DispatchConfig
from model.files import check_replaceable
from model.layers.routed import RoutedConfig
from model.tokenizer import Tokenizer
from model.train import run_folder
from model.train.data import PackedDataset, excerpts
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.routing import Balanced
from model.train.step import DTYPES, StepConfig, Task
from model.transformer import Transformer, parameters
from ops.moe import DropOrder, Router

DEFAULT = embedded.Plan()


HELD_OUT_WINDOWS = 128

TEXT = flags.DEFINE_string(
  'text', None, "Text file or folder. Default: the source of Python's standard library."
)
TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'Folder of a tokenizer. Default: byte-level BPE trained on the text.'
)
OUT = common.define_out('out/lm', 'Folder for the model, the run and the record.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny model and few updates, in under a minute.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', DTYPES, 'Type of activations; weights, gradients and AdamW stay float32.'
)
ACCUMULATION = flags.DEFINE_integer(
  'accumulation', 1, 'Micro-batches into which a batch is divided.', lower_bound=1
)
CHECKPOINT_EVERY = flags.DEFINE_integer(
  'checkpoint_every', 100, 'Updates between checkpoints.', lower_bound=1
)
EXPERTS = flags.DEFINE_integer(
  'experts', 0, 'Experts per layer, each of --ffn_width; 0: dense layers.', lower_bound=0
)
EXPERTS_PER_TOKEN = flags.DEFINE_integer(
  'experts_per_token', 2, 'Experts that each token goes through.', lower_bound=1
)
SHARED_EXPERTS = flags.DEFINE_integer(
  'shared_experts', 0, 'Experts of --ffn_width that all tokens go through.', lower_bound=0
)
BALANCING = flags.DEFINE_enum(
  'balancing', 'loss', ['loss', 'bias', 'none'], 'What keeps the experts in use.'
)
BALANCING_RATE = flags.DEFINE_float(
  'balancing_rate',
  None,
  'Weight of the balance losses, or how far an update moves the biases. Default: 0.01 and 0.001.',
  lower_bound=0.0,
)
EXPERT_DISPATCH = flags.DEFINE_enum(
  'expert_dispatch',
  'psum',
  get_args(expert_parallel.Strategy),
  'How rows get to experts on several devices; see model/expert_parallel.py.',
)
CAPACITY_FACTOR = flags.DEFINE_float(
  'capacity_factor',
  None,
  'An expert takes so many times an even share, and the rest is dropped. Default: all is taken.',
)
DROP_ORDER = flags.DEFINE_enum(
  'drop_order',
  'token',
  get_args(DropOrder),
  'What finds room first: earlier tokens, or first choices, which then depend on later tokens.',
)
MIXER = flags.DEFINE_string(
  'mixer', mixers.ATTENTION, f'What moves information between tokens: {mixers.HELP}.'
)
ATTENTION_EVERY = flags.DEFINE_integer(
  'attention_every',
  0,
  'Every so many-th layer has attention in place of --mixer; 0: none has.',
  lower_bound=0,
)
MESH = common.define_mesh()
CONTEXT_STRATEGY = common.define_context_strategy()
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the initial weights, the order and the passages.')


def _define(name: str, text: str) -> flags.FlagHolder:
  value = getattr(DEFAULT, name)
  define = flags.DEFINE_float if isinstance(value, float) else flags.DEFINE_integer
  return define(name, value, text, lower_bound=0)


PLAN_FLAGS = {
  'vocab_size': _define('vocab_size', 'Tokens of the tokenizer, if one is trained.'),
  'width': _define('width', 'Width of the model.'),
  'layers': _define('layers', 'Number of layers.'),
  'query_heads': _define('query_heads', 'Query heads per layer.'),
  'kv_heads': _define('kv_heads', 'Key and value heads per layer; divides the query heads.'),
  'head_width': _define('head_width', 'Width of each head.'),
  'ffn_width': _define('ffn_width', 'Width of the gated feed-forward layers.'),
  'seq_len': _define(
    'seq_len', 'Tokens per row; a row may hold several documents, which do not see each other.'
  ),
  'batch_size': _define('batch_size', 'Rows per update.'),
  'steps': _define('steps', 'Updates.'),
  'warmup_steps': _define('warmup_steps', 'Updates during which the learning rate rises.'),
  'learning_rate': _define('learning_rate', 'Peak learning rate; it falls to a tenth of it.'),
}


def main() -> None:
  plan = _plan()
  common.check_positive(**{name: getattr(plan, name) for name in PLAN_FLAGS if 'warm' not in name})
  fit_config, mesh = _fit_config(plan), common.mesh(MESH)
  training.check_mesh(mesh, fit_config.step, [_with_flags(embedded.config(plan))], plan.seq_len)
  texts = corpus.load(TEXT.value)
  out = common.out(OUT.value)
  check_replaceable(out / 'model')
  run_folder.check_free(out / 'run')
  tokenizer = _tokenizer(plan, texts)
  model = Transformer(_model_config(plan, tokenizer), rngs=nnx.Rngs(SEED.value))
  data = _data(plan, texts, tokenizer, joined=_joins(model.config))
  windows = _windows(plan, texts, tokenizer)
  start = time.perf_counter()
  task = Task(objective=_balanced()) if EXPERTS.value else Task()
  result = training.fit(model, data, fit_config, task, folder=out / 'run', mesh=mesh)
  train_s = time.perf_counter() - start
  hf.save_pretrained(result.model, tokenizer, out / 'model')
  quality = perplexity.evaluate(result.model, windows, progress=common.labelled('held-out text'))
  _draw(result, out)
  record = _record(plan, texts, result, quality, train_s)
  records.append(out / 'records.jsonl', record)
  print(
    f'{out / "model"}: {record.value("parameters"):,.0f} parameters, held-out perplexity '
    f'{record.value("ppl"):.2f}, {record.value("bits_per_byte"):.3f} bits a byte'
  )


def _draw(result, out) -> None:
  name = 'cross_entropy' if EXPERTS.value else 'loss'
  loss_figure.write([record[name] for record in result.records], out / 'loss.png')
  if EXPERTS.value:
    experts_figure.write(result.records, out / 'experts.png')


def _balanced() -> Balanced:
  """The objective by the flags."""
  rate = BALANCING_RATE.value
  if BALANCING.value == 'loss':
    return Balanced(balance=0.01 if rate is None else rate)
  if BALANCING.value == 'bias':
    return Balanced(balance=0.0, bias_rate=0.001 if rate is None else rate)
  return Balanced(balance=0.0)


def _fit_config(plan) -> FitConfig:
  return FitConfig(
    optimizer=OptimizerConfig(
      steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps
    ),
    step=StepConfig(
      compute_dtype=DTYPE.value,
      accumulation=ACCUMULATION.value,
      dispatch=_dispatch(),
      context=CONTEXT_STRATEGY.value,
    ),
    checkpoint_every=CHECKPOINT_EVERY.value,
  )


def _dispatch() -> DispatchConfig:
  return DispatchConfig(
    strategy=EXPERT_DISPATCH.value,
    capacity_factor=CAPACITY_FACTOR.value,
    drop_order=DROP_ORDER.value,
  )


def _plan() -> embedded.Plan:
  """The default or the smoke plan, with the flags that were given."""
  plan = embedded.SMOKE if SMOKE.value else DEFAULT
  given = {name: holder.value for name, holder in PLAN_FLAGS.items() if holder.present}
  return dataclasses.replace(plan, **given)


def _tokenizer(plan, texts) -> Tokenizer:
  if TOKENIZER.value is None:
    passages = excerpts(texts.train, plan.tokenizer_characters, seed=SEED.value)
    return Tokenizer.train_bpe(passages, plan.vocab_size)
  tokenizer = Tokenizer.load(TOKENIZER.value)
  if tokenizer is None:
    names = ' nor '.join(tokenizer_lib.MODEL_FILES)
    raise ValueError(f'--tokenizer={TOKENIZER.value} has neither {names}')
  return tokenizer


def _model_config(plan, tokenizer):
  config = embedded.config(plan, tokenizer)
  config = config.replace(
    vocab_size=tokenizer.vocab_size, max_positions=max(config.max_positions, plan.seq_len)
  )
  return _with_flags(config)


def _with_flags(config):
  """The same model with the mixers and the experts of the flags."""
  return _with_experts(mixers.replaced(config, MIXER.value, ATTENTION_EVERY.value))


def _with_experts(config):
  """The same model with the experts of the flags, if they ask for any.

  What a single choice is multiplied by trains its router.
  """
  if not EXPERTS.value:
    return config
  choices, width = EXPERTS_PER_TOKEN.value, config.layers[0].ffn.width
  ffn = RoutedConfig(
    experts=EXPERTS.value,
    width=width,
    router=Router(choices=choices, renormalize=choices > 1),
    shared_width=SHARED_EXPERTS.value * width,
    choice_bias=BALANCING.value == 'bias',
  )
  layers = tuple(dataclasses.replace(layer, ffn=ffn) for layer in config.layers)
  return config.replace(family='mixtral', layers=layers)


def _joins(config) -> bool:
  """Whether documents that share a row see each other, because a mixer cannot tell them apart."""
  return not all(layer.mixer.separates for layer in config.layers)


def _data(plan, texts, tokenizer, *, joined: bool) -> PackedDataset:
  row = plan.seq_len * training.CHARACTERS_A_TOKEN
  documents = excerpts(
    texts.train, plan.steps * plan.batch_size * row, seed=SEED.value, shortest=row
  )
  settings = {'seq_len': plan.seq_len, 'batch_size': plan.batch_size, 'seed': SEED.value}
  return PackedDataset.from_texts(documents, tokenizer, joined=joined, **settings)


def _windows(plan, texts, tokenizer) -> perplexity.Windows:
  seq_len = plan.seq_len
  sample = excerpts(texts.held_out, HELD_OUT_WINDOWS * seq_len * training.CHARACTERS_A_TOKEN)
  ids_T, ends_T = tokenizer.encode_with_bytes('\n'.join(sample))
  return perplexity.windows(ids_T, ends_T, seq_len, HELD_OUT_WINDOWS)


def _record(plan, texts, result, quality, train_s) -> records.Record:
  last = result.records[-1]
  sizes = [param.get_value().size for param in parameters(result.model).values()]
  return records.Record(
    experiment='train_lm',
    recipe='adamw',
    command=common.command(),
    config={
      **dataclasses.asdict(plan),
      'dtype': DTYPE.value,
      'accumulation': ACCUMULATION.value,
      'experts': EXPERTS.value,
      'experts_per_token': EXPERTS_PER_TOKEN.value if EXPERTS.value else None,
      'shared_experts': SHARED_EXPERTS.value if EXPERTS.value else None,
      'balancing': dataclasses.asdict(_balanced()) if EXPERTS.value else None,
      'dispatch': dataclasses.asdict(_dispatch()) if EXPERTS.value else None,
      'mixer': MIXER.value,
      'documents_joined': _joins(result.model.config),
      'attention_every': ATTENTION_EVERY.value,
      'text': texts.source,
      'text_fingerprint': texts.fingerprint,
    },
    environment=records.environment(),
    seed=SEED.value,
    metrics={
      'ppl': records.Metric(quality.ppl, '1', quality.tokens),
      'bits_per_byte': records.Metric(quality.bits_per_byte, 'bits', quality.tokens),
      'train_loss': records.Metric(last['loss'], 'nats', last['tokens']),
      'parameters': records.Metric(sum(sizes), '1'),
      'active_parameters': records.Metric(cost.parameters(result.model.config).active, '1'),
      'train_time': records.Metric(train_s, 's'),
      **(_use_of_experts(last) if EXPERTS.value else {}),
    },
    notes=[
      'train_time counts from the last resumption',
      *(['train_loss contains the balance losses'] if EXPERTS.value else []),
    ],
  )


def _use_of_experts(last) -> dict[str, records.Metric]:
  """Means over the layers, of the last update."""
  names = ('max_violation', 'dead', 'dropped')
  return {name: records.Metric(last[name], '1', last['tokens']) for name in names}


if __name__ == '__main__':
  common.run(main)
