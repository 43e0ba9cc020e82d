"""Fast twins of the ops, one folder a platform."""
