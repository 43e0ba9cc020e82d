"""DeepSeek-V3: DeepSeek-V2 with sigmoid scores, and a bias that balances the choice of experts.

The bias is a buffer (`e_score_correction_bias`) that counts in the choice alone; groups of experts
are compared by their two best scores together. The module that predicts further tokens, layer 61,
is left out. After DeepSeek-AI (2024), https://arxiv.org/abs/2412.19437. transformers:
models/deepseek_v3 (5.24).
"""

import dataclasses

from model.hf_names import deepseek_v2, fields, llama, moe

DEFAULTS = llama.Defaults(
  vocab_size=129280,
  width=7168,
  ffn_width=18432,
  layers=61,
  heads=128,
  max_positions=4096,
  bos=0,
  eos=1,
)
FIRST_DENSE = 3
FURTHER_TOKENS = r'^model\.layers\.61\.'


def _from_hf(hf):
  fields.refuse(hf, 'scoring_func', 'sigmoid')
  fields.refuse(hf, 'topk_method', 'noaux_tc')
  fields.refuse(hf, 'rope_interleave', True, None)
  router = {
    'score': 'sigmoid',
    'groups': fields.size(hf, 'n_group', 8),
    'group_limit': fields.size(hf, 'topk_group', 4),
    'group_score': 'sum_of_two',
    'renormalize': fields.flag(hf, 'norm_topk_prob', True),
    'scale': 2.5,
  }
  sizes = {'count': 256, 'choices': 8, 'width': 2048, 'shared': 1}
  experts = deepseek_v2.experts(hf, **sizes, router=router, choice_bias=True)
  return deepseek_v2.decoder(hf, 'deepseek_v3', DEFAULTS, experts, FIRST_DENSE)


def _to_hf(config):
  router = moe.first(config).router
  return {
    **deepseek_v2.to_hf(config, DEFAULTS),
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'rope_interleave': True,
    'n_group': router.groups,
    'topk_group': router.open_groups,
    'norm_topk_prob': router.renormalize,
    'num_nextn_predict_layers': 0,
  }


DEEPSEEK_V3 = dataclasses.replace(
  deepseek_v2.DEEPSEEK_V2,
  model_type='deepseek_v3',
  architecture='DeepseekV3ForCausalLM',
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  ignored=(FURTHER_TOKENS,),
)
