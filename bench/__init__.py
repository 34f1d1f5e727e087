"""Measurements: ``python -m bench``, ``python -m bench.aot``, ``pytest bench --benchmark-only``,
``bench/quality.py``."""
