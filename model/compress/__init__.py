"""Compression: the registry of techniques, recipes of them, calibration and the pipeline."""

from model.compress import autoround as autoround
from model.compress import awq as awq
from model.compress import block_selection as block_selection
from model.compress import densifying as densifying
from model.compress import expert_merging as expert_merging
from model.compress import expert_pruning as expert_pruning
from model.compress import factoring as factoring
from model.compress import grouped_heads as grouped_heads
from model.compress import hqq as hqq
from model.compress import latent_heads as latent_heads
from model.compress import linearize as linearize
from model.compress import obs as obs
from model.compress import owl as owl
from model.compress import rotate as rotate
from model.compress import shared_caches as shared_caches
from model.compress import slicing as slicing
from model.compress import smoothquant as smoothquant
from model.compress import sparse_attention as sparse_attention
from model.compress import structured as structured
from model.compress import techniques as techniques
from model.compress import untying as untying
from model.compress import upcycling as upcycling
