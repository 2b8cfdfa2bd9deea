"""Training: optimizer groups, schedule, EMA, checkpoints, and the step that both trainers share."""
