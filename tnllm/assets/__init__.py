"""Paths of packaged files."""
def demo_weights(): raise NotImplementedError
