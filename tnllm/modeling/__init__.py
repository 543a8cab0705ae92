"""The architecture: config, layers, model, recurrent state, weights."""
