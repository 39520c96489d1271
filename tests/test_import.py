"""Importing the package changes nothing in the process and brings in none of the extras."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tdconcepts

EXTRAS = ["gymnasium", "jinja2", "matplotlib", "optuna", "ray", "sklearn", "torchrl", "tqdm", "transformers"]

# Runs in a fresh process: what the process looks like before and after `import tdconcepts`.
PROBE = """
import atexit, json, logging, multiprocessing, os, random, signal, sys, threading, warnings
import numpy, torch, torch.nn.functional, tensordict, tensordict.nn

def look():
    module = torch.nn.modules.module
    patched = [torch, torch.Tensor, torch.autograd, torch.nn.Module, torch.nn.functional, tensordict.TensorDict,
               tensordict.nn.TensorDictModuleBase, tensordict.nn.TensorDictModule, tensordict.nn.TensorDictSequential]
    loggers = [logging.root, *(l for l in logging.Logger.manager.loggerDict.values() if isinstance(l, logging.Logger))]
    return {
        "start method": multiprocessing.get_start_method(allow_none=True),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "torch RNG": torch.get_rng_state().tolist(),
        "random RNG": repr(random.getstate()),
        "numpy RNG": repr(numpy.random.get_state()),
        "warnings": repr(warnings.filters),
        "global hooks": {k: len(v) for k, v in vars(module).items() if k.startswith("_global_") and hasattr(v, "keys")},
        "function modes": repr(torch.overrides._get_current_function_mode_stack()),
        "attributes": [{k: id(v) for k, v in vars(owner).items() if not k.startswith("__")} for owner in patched],
        "pytrees": len(torch.utils._pytree.SUPPORTED_NODES),
        "dynamo": repr(torch._dynamo.config.get_config_copy()),
        "interaction type": str(tensordict.nn.probabilistic.interaction_type()),
        "logging": [[l.name, l.level, repr(l.handlers)] for l in loggers if "tdconcepts" not in l.name],
        "environment": dict(os.environ),
        "path": [list(sys.path), repr(sys.meta_path), repr(sys.path_hooks)],
        "hooks of the interpreter": [repr(sys.excepthook), repr(sys.displayhook), atexit._ncallbacks()],
        "signals": repr([signal.getsignal(s) for s in signal.valid_signals()]),
    }

before, modules = look(), set(sys.modules)
{action}
after = look()
packages = sorted({m.split(".")[0] for m in set(sys.modules) - modules})
print(json.dumps({
    "changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]},
    "packages": [p for p in packages if p not in sys.stdlib_module_names],
    "dynamo was there": "torch._dynamo" in modules,
}))
"""


def probe(action: str) -> dict:
    source = PROBE.replace("{action}", action)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_changes_nothing():
    seen = probe("import tdconcepts")
    assert seen["changed"] == {}
    assert seen["packages"] == ["tdconcepts"]
    assert seen["dynamo was there"]  # tensordict brings it: were it loaded by us, importing would take seconds


def lazy_modules() -> list[str]:
    """Every module, the demo excepted, which is made of the extras."""
    package = Path(tdconcepts.__file__).parent
    names = [path.relative_to(package.parent).with_suffix("").parts for path in sorted(package.rglob("*.py"))]
    return [".".join(name).removesuffix(".__init__") for name in names if name[1] != "demo"]


def test_no_module_needs_an_extra_to_be_imported():
    """Made unimportable, the extras are not missed: what draws, searches or probes asks for them when it is used."""
    blocked = f"sys.modules.update(dict.fromkeys({EXTRAS!r}))"
    seen = probe(f"import importlib; {blocked}; [importlib.import_module(m) for m in {lazy_modules()!r}]")
    assert set(seen["packages"]) - set(EXTRAS) == {"tdconcepts"}
    assert seen["changed"] == {}


def test_the_probe_can_fail():
    seen = probe(
        "import os, torch, colorsys, hypothesis; os.environ['TDC'] = '1'; torch.set_default_dtype(torch.double)"
    )
    assert set(seen["changed"]) >= {"environment", "default dtype"}
    assert "hypothesis" in seen["packages"]


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(tdconcepts.__path__) if m.name != "__main__"])
def test_every_room_says_what_it_exports(name):
    try:
        room = importlib.import_module(f"tdconcepts.{name}")
    except ImportError as error:
        pytest.skip(f"an extra is missing: {error}")
    assert all(hasattr(room, public) for public in room.__all__)


def test_the_package_s_own_names():
    assert all(hasattr(tdconcepts, name) for name in tdconcepts.__all__)
    assert Path(tdconcepts.__file__).with_name("py.typed").is_file()
