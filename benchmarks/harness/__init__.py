"""The machinery of the benchmarks: registry, checks, timing, ceilings, memory, report, plots."""
