"""The training loop and what it stands on: config, optimizer, schedule, checkpoints, metrics."""
