"""How well a trained model answers, measured on held-out data."""
