"""The benchmarks of bench.py, by topic."""
