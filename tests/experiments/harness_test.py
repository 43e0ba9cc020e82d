"""The script around lm-evaluation-harness, and its class for our models against its own one."""

import importlib.util
import json
import math

import pytest
from absl import flags

from model.eval import library_tasks, records, tasks

# Sums of log-probabilities of a few tokens in float32, by two libraries that add in other orders.
TOLERANCE = 1e-4
INSTALLED = importlib.util.find_spec('lm_eval') is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason='lm-evaluation-harness is not installed')


@pytest.fixture(scope='module')
def script(make_script):
  """The script, which needs no base model."""
  yield make_script('harness')
  flags.FLAGS.unparse_flags()


def test_tasks_are_written_without_the_harness(script, tmp_path, capsys):
  script(f'--write_tasks={tmp_path}/tasks')
  names = [f'{tmp_path}/tasks/{name}.yaml' for name in library_tasks.TASKS]
  assert capsys.readouterr().out.split() == names
  lines = (tmp_path / 'tasks' / 'python_lines.jsonl').read_text().splitlines()
  documents = library_tasks.load('python_lines').documents
  assert [json.loads(line)['choices'] for line in lines] == [list(d.choices) for d in documents]


def test_bad_input_is_refused(script, tmp_path, monkeypatch):
  for missing in (['--model=x', '--tasks=y'], ['--model=x', '--output=z'], []):
    with pytest.raises(ValueError, match='harness needs --model, --tasks and --output'):
      script(*missing)
  every = ['--model=x', '--tasks=mine', f'--output={tmp_path}/records.jsonl']
  with monkeypatch.context() as patch:
    patch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval not installed; pip install -e '.\[harness\]'"):
      script(*every)
  if INSTALLED:
    with pytest.raises(ValueError, match='there is no task file'):
      script(*every, f'--task_folder={tmp_path}')
    (tmp_path / 'other.yaml').write_text('task: other\n')
    with pytest.raises(ValueError, match="there is no 'mine' in"):
      script(*every, f'--task_folder={tmp_path}')


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """(ours, theirs) of a tiny checkpoint that transformers wrote."""
  import torch
  import transformers
  from lm_eval.models.huggingface import HFLM

  from experiments import common, harness_adapter
  from model.tokenizer import Tokenizer

  folder = tmp_path_factory.mktemp('tiny')
  texts = [
    text
    for name in library_tasks.TASKS
    for d in _documents(name)
    for text in (d.context, *d.choices)
  ]
  tokenizer = Tokenizer.train_bpe(texts, 600)
  tokenizer.save(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape) * 0.1)
  model.save_pretrained(folder)
  ours = harness_adapter.LissomLM(*common.load_model(str(folder)), name='tiny')
  # With its cache, 0.4.13 takes the wrong prediction where the same tokens are split in two ways.
  options = {'dtype': 'float32', 'batch_size': 4, 'device': 'cpu', 'logits_cache': False}
  return ours, HFLM(pretrained=str(folder), **options), folder


def _documents(name) -> tuple[tasks.Document, ...]:
  return library_tasks.load(name, 10).documents


def _instances(kind, arguments):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@needs_harness
def test_log_likelihoods_are_those_of_the_class_for_transformers(both):
  ours, theirs, _ = both
  pairs = [(d.context, c) for n in library_tasks.TASKS for d in _documents(n) for c in d.choices]
  pairs += [('', 'def f'), ('def f(x): ', 'return x'), ('Größe ', '東京 🎉'), ('🎉', '🎉🎉')]
  pairs += [('<|endoftext|>def', ' f'), ('long ' * 200, 'short'), ('x' * 300, ' y' * 40)]
  found = ours.loglikelihood(_instances('loglikelihood', pairs))
  expected = theirs.loglikelihood(_instances('loglikelihood', pairs), disable_tqdm=True)
  for (log_prob, greedy), (other, other_greedy) in zip(found, expected, strict=True):
    assert log_prob == pytest.approx(other, abs=TOLERANCE)
    assert greedy == other_greedy
  assert len({log_prob for log_prob, _ in found}) > len(pairs) / 2
  texts = [(text,) for text in ('', 'a', 'def f(x):\n  return x\n' * 40, 'Größe 東京')]
  found = ours.loglikelihood_rolling(_instances('loglikelihood_rolling', texts))
  expected = theirs.loglikelihood_rolling(
    _instances('loglikelihood_rolling', texts), disable_tqdm=True
  )
  assert found == pytest.approx(expected, abs=10 * TOLERANCE)  # of ten times as many tokens


@needs_harness
def test_continuations_are_those_of_the_class_for_transformers(both):
  ours, theirs, _ = both
  contexts = ['def f(x):', 'The', 'long ' * 100, 'Größe ']
  greedy = {'until': [], 'max_gen_toks': 12, 'do_sample': False}
  run = lambda lm, options, **more: lm.generate_until(
    _instances('generate_until', [(one, dict(options)) for one in contexts]), **more
  )
  whole = run(ours, greedy)
  # One at a time: the class cuts a batch as if all were as long as its longest.
  alone = [
    theirs.generate_until(_instances('generate_until', [(one, dict(greedy))]), disable_tqdm=True)
    for one in contexts
  ]
  assert [[one] for one in whole] == alone
  stop = whole[0][3:5]
  cut = run(ours, {**greedy, 'until': [stop]})
  assert cut == [text.split(stop)[0] for text in whole]
  drawn = {'temperature': 0.8, 'do_sample': True, 'max_gen_toks': 12}
  assert run(ours, drawn) == run(ours, drawn) != whole
  with pytest.raises(ValueError, match='a task asks for 128 new tokens, but the model reads 128'):
    run(ours, {'max_gen_toks': 128})


@needs_harness
@pytest.mark.filterwarnings('default')  # what the harness and its datasets warn of
def test_local_tasks_run_without_a_network(both, script, tmp_path, capsys):
  """Files of ours and of a user, and the grades of the harness are those of the main job."""
  *_, folder = both
  script(f'--write_tasks={tmp_path}/tasks')
  (tmp_path / 'tasks' / 'mine.jsonl').write_text('{"q": "def f(x):", "a": " return x"}\n' * 3)
  (tmp_path / 'tasks' / 'mine.yaml').write_text(
    f'task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/'
    'mine.jsonl}}\ntest_split: test\noutput_type: generate_until\ndoc_to_text: "{{q}}"\n'
    'doc_to_target: "{{a}}"\ngeneration_kwargs: {until: ["x"], max_gen_toks: 8}\n'
    'metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n'
  )
  output = tmp_path / 'records.jsonl'
  names = [*library_tasks.TASKS, 'mine']
  tasks_flag = f'--tasks={",".join(names)}'
  script(
    f'--model={folder}',
    tasks_flag,
    f'--task_folder={tmp_path}/tasks',
    f'--output={output}',
    '--limit=10',
  )
  rows = {row.recipe: row for row in records.read(output)}
  assert list(rows) == names
  from experiments import common
  from model.infer.prepare import prepare

  model, tokenizer = common.load_model(str(folder))
  exams = [tasks.exam(library_tasks.load(name, 10), tokenizer) for name in library_tasks.TASKS]
  for one, grade in zip(exams, tasks.grade(prepare(model), exams), strict=True):
    metric = 'acc' if one.task.is_cloze else 'acc_norm'
    row = rows[one.task.name]
    assert row.metrics[metric].value == grade.accuracy and row.metrics[metric].n == 10
    assert row.value(f'{metric}_se') == pytest.approx(grade.standard_error)
  assert math.isfinite(rows['mine'].value('exact_match'))
  assert len({row.config['task_fingerprint'] for row in rows.values()}) == len(names)
  assert 'acc_norm' in capsys.readouterr().out
