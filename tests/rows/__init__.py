"""The rows of the conformance table, a file for each room: a new method adds a row to its room's file."""
