"""Published tables, run again: `python -m benchmarks.papers.NAME`."""
