"""Figures and pages: what was measured, as one self-contained file."""

from tdconcepts.report.page import Section

__all__ = ["Section"]
