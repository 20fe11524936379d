"""Benchmarks, each a command: `python -m benchmarks.<name> [--json FILE]`."""
