"""What loading and saving do with folders: damaged, foreign, fetched, replaced."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from model import hf, hf_folder, manifest, transformer
from model.tokenizer import Tokenizer

VOCABULARY = 99
EMBEDDING = 'model.embed_tokens.weight'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  config = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
  )
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp('llama')
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


@pytest.fixture
def folder(source, tmp_path):
  """A copy of a tiny llama, to be damaged."""
  return shutil.copytree(source, tmp_path / 'damaged')


def _arrays(model):
  return {
    path: np.asarray(param.get_value()) for path, param in transformer.parameters(model).items()
  }


def _assert_same_arrays(ours, others):
  assert ours.keys() == others.keys()
  for name, array in ours.items():
    assert array.dtype == others[name].dtype, name
    np.testing.assert_array_equal(array, others[name], err_msg=name)


def _edit(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(folder, edit):
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  edit(tensors)
  save_file(tensors, path, {'format': 'pt'})


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder):
  def damage(tensors):
    del tensors['lm_head.weight']
    tensors['model.layers.0.mlp.extra.weight'] = np.zeros((2, 3), np.float32)
    tensors['model.norm.weight'] = np.zeros(65, np.float32)
    tensors[EMBEDDING] = np.zeros((VOCABULARY, 64), np.int8)

  _edit_tensors(folder, damage)
  with pytest.raises(ValueError) as caught:
    hf.load_pretrained(folder)
  for line in (
    r'missing: lm_head.weight (99, 64)',
    r'unexpected: model.layers.0.mlp.extra.weight (2, 3)',
    r'misshapen: model.norm.weight is (65,), not (64,)',
    r'unsupported dtype: model.embed_tokens.weight is int8',
    '(4)',
  ):
    assert line in str(caught.value)


def test_long_lists_are_capped_with_a_count(folder):
  _edit(folder, num_hidden_layers=9)
  with pytest.raises(ValueError, match='and 43 more') as caught:
    hf.load_pretrained(folder)
  assert '(63)' in str(caught.value) and len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_listed(folder, value):
  def damage(tensors):
    tensors['model.norm.weight'][3] = value
    tensors['model.layers.1.mlp.up_proj.weight'][2, 5] = value

  _edit_tensors(folder, damage)
  with pytest.raises(ValueError, match=r'NaN or infinity') as caught:
    hf.load_pretrained(folder)
  assert 'model.norm.weight' in str(caught.value) and 'up_proj' in str(caught.value)


def test_folders_without_a_readable_checkpoint_say_why(folder, tmp_path):
  with pytest.raises(ValueError, match='no folder'):
    hf.load_pretrained(tmp_path / 'nowhere' / 'at' / 'all')
  with pytest.raises(ValueError, match='no folder'):
    hf.load_pretrained(folder / 'config.json')
  with pytest.raises(ValueError, match=r'has no config\.json'):
    hf.load_pretrained(tmp_path)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match=r'pickles \(pytorch_model\.bin\).*save_pretrained'):
    hf.load_pretrained(folder)
  (folder / 'pytorch_model.bin').unlink()
  with pytest.raises(ValueError, match=r'has neither model\.safetensors'):
    hf.load_pretrained(folder)
  (folder / 'config.json').write_text('{"model_type": ')
  with pytest.raises(ValueError, match=r'config\.json is no JSON'):
    hf.load_pretrained(folder)


def test_hub_names_are_fetched_without_pickles(folder, monkeypatch):
  import huggingface_hub

  asked = {}

  def snapshot_download(name, **patterns):
    asked.update(name=name, **patterns)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  model, _ = hf.load_pretrained('someone/some-model')
  assert asked['name'] == 'someone/some-model' and model.config.family == 'llama'
  chosen = list(
    huggingface_hub.utils.filter_repo_objects(
      [
        *('config.json', 'model-00001-of-00002.safetensors', 'tokenizer.model', 'merges.txt'),
        *('pytorch_model.bin', 'original/consolidated.00.pth', 'onnx/config.json', 'model.gguf'),
        *('consolidated.safetensors', 'flax_model.msgpack', 'chat_template.jinja'),
      ],
      allow_patterns=asked['allow_patterns'],
      ignore_patterns=asked['ignore_patterns'],
    )
  )
  assert chosen == [
    *('config.json', 'model-00001-of-00002.safetensors', 'tokenizer.model', 'merges.txt'),
    'chat_template.jinja',
  ]


def test_hub_failures_are_value_errors(monkeypatch):
  import huggingface_hub

  def unreachable(*_, **__):
    raise huggingface_hub.errors.LocalEntryNotFoundError('offline')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
  with pytest.raises(ValueError, match='no local folder, and it could not be fetched'):
    hf.load_pretrained('someone/some-model')


def test_tokenizers_travel_with_the_model(folder, tmp_path):
  model, _ = hf.load_pretrained(folder)
  text = 'the tokenizer travels with the model'
  wide = Tokenizer.train_bpe([text] * 20, vocab_size=280)  # 257 bytes and specials at least
  with pytest.raises(ValueError, match='vocabulary of 99'):
    hf.save_pretrained(model, wide, tmp_path / 'saved')
  _edit(folder, vocab_size=300)
  resize = lambda t, name: t.update({name: np.resize(t[name], (300, 64))})
  _edit_tensors(folder, lambda t: [resize(t, 'lm_head.weight'), resize(t, EMBEDDING)])
  model, _ = hf.load_pretrained(folder)
  hf.save_pretrained(model, wide, tmp_path / 'saved')
  _, loaded = hf.load_pretrained(tmp_path / 'saved')
  assert loaded.encode(text) == wide.encode(text)
  hf.save_pretrained(model, wide, tmp_path / 'saved')  # replaces its own output
  (folder / 'tokenizer.json').write_bytes((tmp_path / 'saved/tokenizer.json').read_bytes())
  _edit(folder, vocab_size=99)
  with pytest.raises(ValueError, match='vocabulary of 99'):
    hf.load_pretrained(folder)


def test_stop_tokens_of_generation_config_win(folder):
  (folder / 'generation_config.json').write_text('{"eos_token_id": [7, 8]}')
  assert hf.load_config(folder).eos_ids == (7, 8)


@pytest.mark.parametrize('text', ['', '\n', '{}'])
def test_an_empty_generation_config_says_nothing(folder, text):
  _edit(folder, eos_token_id=3)
  (folder / 'generation_config.json').write_text(text)
  Tokenizer.train_bpe(['text'], 257).save(folder)
  _edit(folder, vocab_size=VOCABULARY)
  assert hf.load_config(folder).eos_ids == (3,)


@pytest.mark.parametrize('generation', [True, False])
@pytest.mark.parametrize('pad', [7, 0, None])
def test_the_pad_token_survives_saving(folder, tmp_path, pad, generation):
  _edit(folder, pad_token_id=pad)
  path = folder / 'generation_config.json'
  path.write_text(json.dumps({'eos_token_id': 2, 'pad_token_id': pad}))
  if not generation:
    path.unlink()
  model, _ = hf.load_pretrained(folder)
  vocabulary = {'vocab.json': json.dumps({'a': 0, '<pad>': 7}), 'merges.txt': '#version: 0.2\n'}
  for name, data in vocabulary.items():
    (folder / name).write_text(data)
  (folder / 'tokenizer_config.json').write_text('{"pad_token": "<pad>"}')
  for tokenizer in (None, Tokenizer.load(folder)):
    out = tmp_path / f'out {tokenizer is None}'
    hf.save_pretrained(model, tokenizer, out)
    assert transformers.AutoConfig.from_pretrained(out).pad_token_id == pad
    assert transformers.GenerationConfig.from_pretrained(out).pad_token_id == pad
    assert hf.load_pretrained(out)[0].config == model.config
  Tokenizer.load(folder).save(tmp_path / 'tokenizer')
  again = json.loads((tmp_path / 'tokenizer' / 'generation_config.json').read_text())
  assert again.get('pad_token_id') == pad


def test_a_pad_token_past_the_last_row_loads(folder, tmp_path):
  vocabulary = {f'{i:02}': i for i in range(VOCABULARY)}
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  (folder / 'merges.txt').write_text('')
  (folder / 'added_tokens.json').write_text(json.dumps({'<pad>': VOCABULARY}))
  model, tokenizer = hf.load_pretrained(folder)
  assert tokenizer.encode('<pad>') == [VOCABULARY]
  hf.save_pretrained(model, tokenizer, tmp_path / 'out')
  assert hf.load_pretrained(tmp_path / 'out')[1] == tokenizer


def test_a_killed_save_leaves_the_earlier_output(folder, monkeypatch):
  manifest.write(folder, 'model')  # as if it had been saved by us
  model, _ = hf.load_pretrained(folder)
  before = sorted(path.read_bytes() for path in folder.iterdir())

  def killed(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(hf_folder.safetensors_io, 'write_folder', killed)
  with pytest.raises(KeyboardInterrupt):
    hf.save_pretrained(model, None, folder)
  assert sorted(path.read_bytes() for path in folder.iterdir()) == before
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_save_replaces_the_folder_it_was_loaded_from(folder):
  manifest.write(folder, 'model')  # as if it had been saved by us
  model, _ = hf.load_pretrained(folder)
  arrays = _arrays(model)
  hf.save_pretrained(model, None, folder, max_shard_bytes=50_000)
  assert not (folder / 'model.safetensors').exists()
  _assert_same_arrays(_arrays(hf.load_pretrained(folder)[0]), arrays)
  _assert_same_arrays(_arrays(model), arrays)


def test_save_refuses_folders_that_hold_something_else(folder, tmp_path):
  model, _ = hf.load_pretrained(folder)
  (tmp_path / 'work').mkdir()
  (tmp_path / 'work/thesis.tex').write_text('years')
  with pytest.raises(ValueError, match=r'holds something else \(thesis\.tex\)'):
    hf.save_pretrained(model, None, tmp_path / 'work')
  assert (tmp_path / 'work/thesis.tex').read_text() == 'years'
  with pytest.raises(ValueError, match='is not a folder'):
    hf.save_pretrained(model, None, tmp_path / 'work/thesis.tex')
