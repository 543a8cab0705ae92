"""A whole decode step in one persistent Triton kernel: `narrow` for small models, `wide` for large ones.

Both take the same `common.DecodeModel` and run the same phases, one program per SM:

    embed | q k v u = W y | state, o | x += W_o (norm(o) * u) | h = (W_1 y) * (W_2 y) | x += W_3 h | ... | logits

Names in both: P programs; R rows of a matrix that a program handles at once; K columns of a matrix; M model dim, F GLU dim,
D head dim, H heads, V vocabulary. A B before a dim (BM, BD, ...) is its block size, the next power of two.
"""
