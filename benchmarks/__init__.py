"""Measures ROSE beside the bare minimum; each module has `main()` and writes JSON to benchmarks/results/."""
