"""Scaffolding that several methods use unchanged; imports no method."""
