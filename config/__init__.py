"""What the operator chose: settings, profiles of known checkpoints, and the bundled checkpoint.

Knows nothing of HTTP, tensors or processes.
"""
