"""The peers that results are compared with: imported here, so that a missing one is a skip with a reason."""

import importlib
import importlib.metadata
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

STUBS = Path(__file__).parent / "stubs"
STAND_INS = frozenset(path.stem for path in STUBS.iterdir() if path.suffix != ".md" and path.stem != "__pycache__")


def oracle(name: str) -> ModuleType:
    """A module of a peer, such as ``oracle("captum.attr")``; the test is skipped where it isn't installed.

    Zennit and PnPXAI import packages that the tests don't need: for the time of the import, ``tests/stubs`` stands in
    for those that are not there. Warnings of the peer's import are not ours.
    """
    package = name.partition(".")[0]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the oracle {package} is not installed (`make test` installs it)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ask_before_stand_ins()
        if package == "pnpxai":
            _load_before_stand_ins()
        sys.path.append(str(STUBS))  # last: a package that is really installed wins
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(STUBS))
            _forget_stand_ins()


def _ask_before_stand_ins() -> None:
    """transformers asks once whether torchvision and timm are there, and remembers the answer."""
    try:
        asked = importlib.import_module("transformers.utils.import_utils")
    except ImportError:
        return
    for name in ("is_torchvision_available", "is_torchvision_v2_available", "is_timm_available"):
        getattr(asked, name, bool)()


def _load_before_stand_ins() -> None:
    """What asks "is torchvision there?" when it is imported has to ask before the stand-in is."""
    for model in ("bert", "visual_bert", "vilt", "lxmert"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def _forget_stand_ins() -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] in STAND_INS]:
        if str(STUBS) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]
