"""The main job: one command that explains and intervenes on real models, and writes a page about it."""

from tdconcepts.demo.agent import agent_section
from tdconcepts.demo.digits import digits_section
from tdconcepts.demo.run import run_demo

__all__ = ["agent_section", "digits_section", "run_demo"]
