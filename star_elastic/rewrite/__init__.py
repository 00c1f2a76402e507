"""New checkpoints from old ones, tensor by tensor: sorted, sliced, quantised."""
