"""Token ids in, token ids out: batched self-speculative decoding of LayerSkip checkpoints.

Knows nothing of HTTP, text, event loops or processes.
"""
