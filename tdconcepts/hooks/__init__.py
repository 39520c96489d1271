"""How to reach inside a model: sites, targets, programs, contexts and the pull-back."""

from tdconcepts.hooks.edits import Ablate, Add, Edit, Replace, Scale
from tdconcepts.hooks.calling import dispatch_rows
from tdconcepts.hooks.contexts import Bound
from tdconcepts.hooks.explaining import Options
from tdconcepts.hooks.hooked import Hooked, check_td
from tdconcepts.hooks.locate import anchor, locate
from tdconcepts.hooks.pullback import Pullback, Pulled
from tdconcepts.hooks.programs import Capture, Patch, Programs, capture, patch
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.stages import check_module, cut, needed, stages
from tdconcepts.hooks.targets import Target

__all__ = [
    "Bound", "Capture", "Hooked", "Patch", "Programs", "capture", "check_td", "patch",
    "Ablate",
    "Add",
    "Edit",
    "Options",
    "Pullback",
    "Pulled",
    "Replace",
    "Scale",
    "Site",
    "Target",
    "anchor",
    "check_module",
    "dispatch_rows",
    "cut",
    "locate",
    "needed",
    "stages",
]
