"""Benchmarks. Each is a command: `python -m tests.bench.NAME --help`."""
