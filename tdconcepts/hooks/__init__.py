"""How to reach inside a model: sites, targets, programs, contexts and the pull-back."""

from tdconcepts.hooks.calling import dispatch_rows, set_entries
from tdconcepts.hooks.compiling import Compiled, CompileOptions
from tdconcepts.hooks.conditions import Steps, When
from tdconcepts.hooks.controls import MatchedNorm
from tdconcepts.hooks.directions import RemoveDirection, random_directions
from tdconcepts.hooks.edits import Ablate, Add, Edit, Replace, Scale
from tdconcepts.hooks.explaining import Options
from tdconcepts.hooks.hooked import Hooked, check_td
from tdconcepts.hooks.locate import anchor, locate
from tdconcepts.hooks.plans import Bound
from tdconcepts.hooks.programs import Capture, Patch, Programs, capture, patch
from tdconcepts.hooks.pullback import Pullback
from tdconcepts.hooks.sites import Site
from tdconcepts.hooks.stages import check_module, cut, needed, stages
from tdconcepts.hooks.swaps import Weights
from tdconcepts.hooks.targets import Target
from tdconcepts.hooks.twice import differentiable_once_more
from tdconcepts.hooks.watch import Pulled

__all__ = [
    "Ablate",
    "Add",
    "Bound",
    "Capture",
    "CompileOptions",
    "Compiled",
    "Edit",
    "Hooked",
    "MatchedNorm",
    "Options",
    "Patch",
    "Programs",
    "Pullback",
    "Pulled",
    "RemoveDirection",
    "Replace",
    "Scale",
    "Site",
    "Steps",
    "Target",
    "Weights",
    "When",
    "anchor",
    "capture",
    "check_module",
    "check_td",
    "cut",
    "differentiable_once_more",
    "dispatch_rows",
    "locate",
    "needed",
    "patch",
    "random_directions",
    "set_entries",
    "stages",
]
