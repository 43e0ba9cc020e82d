"""generate: the tokens and the text of transformers, for each family with its kind of tokenizer."""

import io
import json

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
  "It is time that we can, and time can tell:  it's é日 🎉.\n",
  'def can(time):\n  return 1',
]
PROMPTS = ('time', 'It is', 'we can\ntime')
TINY = {
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'max_position_embeddings': 64,
}
TRAITS = {
  'Gemma3': {'sliding_window': 4, 'layer_types': ['sliding_attention', 'full_attention']},
  'SmolLM3': {'no_rope_layers': [1, 0]},
}
GPT = {'n_embd': 48, 'n_layer': 2, 'n_head': 4, 'n_positions': 64}


def _sentencepiece(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20),
    model_writer=model,
    **{
      'vocab_size': 330,
      'model_type': 'bpe',
      'byte_fallback': True,
      'normalization_rule_name': 'identity',
      'remove_extra_whitespaces': False,
      'hard_vocab_limit': False,
      'minloglevel': 2,
      **options,
    },
  )
  return {'tokenizer.model': model.getvalue()}


def _byte_level(template):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=['<s>', '</s>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS * 5, trainer)
  if template:
    tokenizer.post_processor = processors.Sequence(
      [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
          single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 0)]
        ),
      ]
    )
  return {'tokenizer.json': tokenizer.to_str().encode()}


def _gemma():
  ids = {'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3}
  pieces = {'bos_piece': '<bos>', 'eos_piece': '<eos>', 'user_defined_symbols': ['<mask>']}
  return _sentencepiece(**ids, **pieces, add_dummy_prefix=False)


LLAMA = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True}
NAMED = {'bos_token': '<s>', 'eos_token': '</s>'}
# The family, the vocabulary, tokenizer_config.json, and the BOS that a prompt begins with.
CASES = {
  'llama, template': ('Llama', lambda: _byte_level(True), NAMED, 0),
  'llama, sentencepiece': ('Llama', _sentencepiece, LLAMA, 1),
  'llama, legacy': ('Llama', _sentencepiece, {**LLAMA, 'legacy': True}, 1),
  'llama, no prefix': ('Llama', _sentencepiece, {**LLAMA, 'add_prefix_space': False}, 1),
  'llama, no class': ('Llama', _sentencepiece, {'add_bos_token': True}, 1),
  'mistral, sentencepiece': ('Mistral', _sentencepiece, {**LLAMA, 'legacy': False}, 1),
  'gemma2': ('Gemma2', _gemma, {'tokenizer_class': 'GemmaTokenizer', 'add_bos_token': True}, 2),
  'gemma3': ('Gemma3', _gemma, {'tokenizer_class': 'GemmaTokenizer', 'add_bos_token': True}, 2),
  'smollm3': ('SmolLM3', lambda: _byte_level(True), NAMED, 0),
  'olmo2': ('Olmo2', lambda: _byte_level(False), NAMED, None),
  'phi3': ('Phi3', _sentencepiece, {**LLAMA, 'add_bos_token': False}, None),
  'qwen2': ('Qwen2', lambda: _byte_level(False), NAMED, None),
  'gpt2': ('GPT2', lambda: _byte_level(False), NAMED, None),
}


# A family with each kind of tokenizer; the others are for -m slow.
QUICK = ('llama, template', 'llama, legacy', 'gemma2', 'gpt2')


@pytest.fixture(
  params=[c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def folder(request, tmp_path):
  """A checkpoint as transformers writes it; (path, its model, its tokenizer, the BOS)."""
  family, vocabulary, settings, bos = CASES[request.param]
  files = {**vocabulary(), 'tokenizer_config.json': json.dumps(settings).encode()}
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  (tmp_path / 'config.json').write_text(
    json.dumps({'model_type': _config_class(family).model_type})
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  model = _model(family, tokenizer)
  model.save_pretrained(tmp_path)
  return tmp_path, model, tokenizer, bos


def _config_class(family):
  return getattr(transformers, f'{family}TextConfig' if family == 'Gemma3' else f'{family}Config')


def _model(family, tokenizer):
  torch.manual_seed(0)
  sizes = GPT if family == 'GPT2' else TINY
  special = {'pad_token_id': 0, 'bos_token_id': 0, 'eos_token_id': 1}
  config = _config_class(family)(
    vocab_size=len(tokenizer), **special, **sizes, **TRAITS.get(family, {})
  )
  name = 'GPT2LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM'
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn(parameter.shape) * 0.15)
    # Bytes that are no text would decode to replacement characters; they are never the likeliest.
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    table = model.get_output_embeddings().weight
    table[[i for i, text in enumerate(names) if len(text) == 6 and text.startswith('<0x')]] = 0
  return model


def test_tokens_and_text_are_those_of_transformers(folder, make_script, capsys):
  path, model, tokenizer, bos = folder
  expected = []
  for prompt in PROMPTS:
    inputs = tokenizer(prompt, return_tensors='pt', return_token_type_ids=False)
    assert (inputs['input_ids'][0, 0] == bos) == (bos is not None)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected.append(tokenizer.decode(out[0], skip_special_tokens=True) + '\n')
  generate = make_script('generate')
  for prompt, text in zip(PROMPTS, expected):
    generate(f'--model={path}', f'--prompt={prompt}', '--max_new_tokens=12')  # streamed
    assert capsys.readouterr().out == text
  generate(f'--model={path}', *(f'--prompt={p}' for p in PROMPTS), '--max_new_tokens=12')
  assert capsys.readouterr().out == ''.join(expected)


@pytest.mark.parametrize('template', ['{{ bos_token }}[{{ messages[0].content }}]', '[x]'])
@pytest.mark.quick(
  folder=('llama, template', 'gemma2'), template=('{{ bos_token }}[{{ messages[0].content }}]',)
)
def test_a_chat_template_brings_its_own_bos(folder, make_script, capsys, template):
  path, model, tokenizer, _ = folder
  settings = json.loads((path / 'tokenizer_config.json').read_text())
  (path / 'tokenizer_config.json').write_text(json.dumps({**settings, 'chat_template': template}))
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  inputs = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'time'}], return_tensors='pt', return_dict=True
  )
  ids_T = inputs['input_ids'][0]
  out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
  before = tokenizer.decode(ids_T, skip_special_tokens=True)
  expected = tokenizer.decode(out, skip_special_tokens=True)[len(before) :]
  make_script('generate')(f'--model={path}', '--prompt=time', '--chat', '--max_new_tokens=12')
  assert capsys.readouterr().out == expected + '\n'
