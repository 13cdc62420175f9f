"""What the benchmarks share: cells that are kept, trained controls, statistics, tables and plots."""
