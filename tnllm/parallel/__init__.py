"""Training on many ranks: the mesh, and what each of its axes does to the model."""
