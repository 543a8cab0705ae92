"""Many runs of the trainer from one file: what to run, running it, and the table that comes out."""
