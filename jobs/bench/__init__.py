"""Benchmarks: engines alone, the whole pipeline, and LoadGen's Offline scenario, each over a job's own rows."""
