"""Tools of a chat: what a call asks of them, and the calls that a model writes into its answer."""
