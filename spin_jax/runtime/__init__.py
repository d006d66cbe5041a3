"""A process and its surroundings: flags, files, other hosts, signals, progress, metrics."""
