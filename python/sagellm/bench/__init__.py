"""Benchmarks of this machine: ``sagellm bench``, ``python -m sagellm.bench``."""
