"""Tasks whose data distribution is known exactly."""
