"""The mixers, which move information between tokens, and what each keeps of past ones."""
