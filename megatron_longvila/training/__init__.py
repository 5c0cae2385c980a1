"""Training: loss, optimizer, metrics and the step loop."""
