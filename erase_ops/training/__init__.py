"""What every trained eraser shares: its settings, the model families, sampling, the loop, checkpoints, validation."""
