"""What a decoder block is made of; it imports nothing of `model` but its own files.

A block has two sub-layers: a mixer, which moves information between tokens, and a feed-forward
network, which works on each token by itself. Read in this order:

  sublayer.py      what the config of a sub-layer says: its module, its wiring, its units
  wiring.py        which linear layers share an input, and where that input comes from
  basic.py         linear layers, norms, tables, and the residual stream between the blocks
  mixers/          the kinds of mixers and what each keeps of past tokens: 'attention', 'latent'
  feed_forward.py  the feed-forward network of kind 'dense'
  kinds.py         the kinds by name, as they stand in files
  block.py         the block, which joins a mixer and a feed-forward network
  lending.py       how a pass hands the keys and values of one block to later ones

A new kind of sub-layer is a file with a config and a module, and a row in `kinds`. Initialisation,
calibration, folding, rotation, pruning of units, cost and files read what the config says.
"""
