"""One question a script; run each as `python -m experiments.NAME --help`."""
