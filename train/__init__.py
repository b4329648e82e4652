"""Training: one stage from one config, on DeepSpeed."""
