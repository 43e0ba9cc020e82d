"""Files of prompts: answers in order, the tokens of each alone, and runs that go on."""

import json

import pytest
from absl import flags

from experiments import offline
from model import hf
from model.infer.generate import generate
from ops.sampling import SamplingConfig

LINES = [
  {'prompt': 'import os\n', 'max_new_tokens': 20},
  {'prompt': 'def add(a, b):', 'temperature': 0.9, 'seed': 4},
  {'prompt': 'class'},
  {'prompt': 'for i in', 'max_new_tokens': 1},
  {'prompt': 'try:\n  import json\n', 'repetition_penalty': 1.2},
]


@pytest.fixture(scope='module')
def generate_script(make_script):
  yield make_script('generate')
  flags.FLAGS.unparse_flags()


def _write(path, lines):
  path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')
  return path


def _read(path):
  return [json.loads(line) for line in path.read_text().split('\n')[:-1]]


def test_answers_are_in_order_and_those_of_each_prompt_alone(tmp_path, base, generate_script):
  prompts, out = _write(tmp_path / 'p.jsonl', LINES), tmp_path / 'a.jsonl'
  generate_script(f'--model={base}', f'--prompts={prompts}', f'--out={out}', '--slots=3',
                  '--max_new_tokens=9')  # fmt: skip
  found = _read(out)
  assert [one['index'] for one in found] == [0, 1, 2, 3, 4]
  model, tokenizer = hf.load_pretrained(base)
  for line, answer in list(zip(LINES, found))[:3]:
    prompt = tokenizer.prompt(line['prompt'])
    (new,) = generate(
      model,
      [prompt],
      max_new_tokens=line.get('max_new_tokens', 9),
      sampling_config=SamplingConfig(temperature=line.get('temperature', 0.0)),
      seed=line.get('seed', 0),
    )
    assert answer['text'] == tokenizer.continuation(prompt, new)
    assert answer['tokens'] == len(new)

  # A run that was ended in the middle of a line goes on and gives the same bytes.
  whole = out.read_bytes()
  out.write_bytes(whole[: whole.index(b'\n') + 30])
  generate_script(f'--model={base}', f'--prompts={prompts}', f'--out={out}', '--slots=3',
                  '--max_new_tokens=9')  # fmt: skip
  assert out.read_bytes() == whole
  with pytest.raises(ValueError, match='other settings'):
    generate_script(f'--model={base}', f'--prompts={prompts}', f'--out={out}', '--seed=1')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "a"', 'line 2: no JSON'),
    ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
    ('[1]', 'either "prompt" or "messages"'),
    ('{"prompt": ""}', 'not empty'),
    ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; there are"),
  ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line, message):
  path = tmp_path / 'p.jsonl'
  path.write_text('{"prompt": "a"}\n' + line)
  with pytest.raises(ValueError, match=message):
    offline.read(path)


@pytest.mark.parametrize('value', ['x', -1, None])
def test_settings_that_make_no_sense_are_refused(value, base):
  tokenizer = hf.load_pretrained(base)[1]
  with pytest.raises(ValueError):
    offline.request(
      {'prompt': 'a', 'temperature': value}, tokenizer,
      max_new_tokens=3, sampling=SamplingConfig(), seed=0,
    )  # fmt: skip
