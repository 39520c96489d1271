"""What `import tdconcepts` costs on top of torch and tensordict, in a fresh process (the aim: less than 0.3 s)."""

import statistics
import subprocess
import sys

import pytest

PROBE = """
import time
t0 = time.perf_counter()
import torch, tensordict, tensordict.nn
t1 = time.perf_counter()
import tdconcepts
print(t1 - t0, time.perf_counter() - t1)
"""


def run_once() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    below, ours = map(float, done.stdout.split())
    return below, ours


@pytest.mark.benchmark(group="import")
def test_import_time(compare):
    run_once()  # compiles the .pyc files
    runs = [run_once() for _ in range(3)]
    below, ours = (statistics.median(column) for column in zip(*runs, strict=True))
    ratios = [ours / below for below, ours in runs]
    compare.add("import tdconcepts / torch and tensordict", ours, below, ratios, "ours < 300000 us", ours < 0.3)
    compare.benchmark.pedantic(lambda: None)  # it was measured in processes of their own
