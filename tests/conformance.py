"""The conformance table: one row for each explainer, stage and context, from ``rows/<room>.py``.

``test_conformance.py`` checks all laws on it.
"""

import importlib
import pkgutil

import rows

ROOMS = [importlib.import_module(f"rows.{room.name}") for room in pkgutil.iter_modules(rows.__path__)]
TABLE = [row for room in ROOMS for row in room.ROWS]
