"""What every test gets: one thread, a seed, figures without a screen, and a check that global state is as before."""

import importlib.util
import os
import re

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

NEEDS_TORCHRL = re.compile(
    r">>> .*\b(from torchrl|"
    r"(\w+_env|gym_envs|ppo_\w+|dqn_\w+|concept_cartpole|lstm_recall|multiagent_meeting|concepts_composite)\()"
)
collect_ignore = ["stubs"]  # collected, they would be in sys.modules under the names that they stand in for

torch.set_num_threads(1)  # the nets are small: more threads only cost

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_collection_modifyitems(items):
    """Examples that run an environment are skipped where there is no torchrl, as the tests are."""
    if importlib.util.find_spec("torchrl") is None:
        for item in items:
            if isinstance(item, pytest.DoctestItem) and NEEDS_TORCHRL.search(item.dtest.docstring or ""):
                item.add_marker(pytest.mark.skip(reason="torchrl is not installed"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global RNG state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def global_state_kept():
    """A test that leaves the process changed fails itself, not the next one."""
    before = _global_state()
    yield
    assert _global_state() == before


def _global_state() -> dict[str, object]:
    module = torch.nn.modules.module
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "global hooks": {name: len(hooks) for name, hooks in vars(module).items() if _is_hook_dict(name, hooks)},
    }


def _is_hook_dict(name: str, value: object) -> bool:
    return name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
