"""Directions: those of the hook core."""

from tdconcepts import hooks
from tdconcepts.interventions import directions


def test_they_are_the_hook_cores():
    assert directions.RemoveDirection is hooks.RemoveDirection
    assert directions.random_directions is hooks.random_directions
