"""flashx-bench: how exact and how fast attention is on this machine (docs/benchmarks.md)."""
