"""Compile the programs of a config for a slice that is not here."""
