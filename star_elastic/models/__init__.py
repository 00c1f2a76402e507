"""The run-time side: transformers models, resident sizes, the elastic model of training."""
