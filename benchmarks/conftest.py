"""Benchmarks measure on one thread, so that ratios don't depend on how many cores are free."""

import torch

torch.set_num_threads(1)
