"""The stages of an iteration. Each reads what it needs from the run's workdir, writes what it makes, and does nothing
if that exists."""
