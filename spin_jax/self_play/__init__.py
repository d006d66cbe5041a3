"""Algorithm 1 of SPIN: a run, its stages, its directory."""
