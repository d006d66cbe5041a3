"""One training stage: optimizer, step, programs, loop."""
