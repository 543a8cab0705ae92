"""Lightning Attention: causal linear attention with one constant decay per head, `o_t = q_t^T S_t`.

    from tnllm.kernels.lightning_attention import lightning_attention, lightning_attention_step

    o, state = lightning_attention(q, k, v, log_decay)                # training, prefill
    o, state = lightning_attention(q, k, v, log_decay, state)         # continue from a state
    o = lightning_attention_step(q1, k1, v1, log_decay, state)        # one token, state updated in place

Read in this order: `reference.py` is the definition; `chunk.py` the chunked form in plain torch (CPU); `kernels.py`,
`launch.py` and `step.py` the Triton kernels and their launches (CUDA); `op.py` registers all of it with autograd and
torch.compile.
"""

from tnllm.kernels.lightning_attention.op import lightning_attention, lightning_attention_step

__all__ = ["lightning_attention", "lightning_attention_step"]
