"""Which engines and GPUs run a checkpoint."""
