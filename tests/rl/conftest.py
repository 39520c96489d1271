"""One agent, trained once for the whole session."""

import pytest


@pytest.fixture(scope="session")
def agent():
    pytest.importorskip("torchrl")
    pytest.importorskip("gymnasium")
    from tdconcepts.rl import ppo_cartpole

    return ppo_cartpole(seed=4)  # the seed that stops earliest


@pytest.fixture
def env():
    pytest.importorskip("torchrl")
    pytest.importorskip("gymnasium")
    from tdconcepts.rl import cartpole_env

    env = cartpole_env(8)
    yield env
    env.close()
