"""Lightning Attention: causal linear attention with one constant decay per head, `o_t = q_t^T S_t`.

    from tnllm.kernels.lightning_attention import lightning_attention, lightning_attention_step

    o, state = lightning_attention(q, k, v, log_decay)                # training, prefill
    o, state = lightning_attention(q, k, v, log_decay, state)         # the next piece of the same text
    o = lightning_attention_step(q1, k1, v1, log_decay, state)        # one token, state updated in place

Read in this order: `reference.py` is the definition, `chunk.py` the fast form in plain torch (CPU),
`forward.py`, `backward.py` and `step.py` the Triton kernels (CUDA), `op.py` what joins them to autograd and
torch.compile.
"""

from tnllm.kernels.lightning_attention.op import lightning_attention, lightning_attention_step

__all__ = ["lightning_attention", "lightning_attention_step"]
