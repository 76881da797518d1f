"""HTTP and text on one side, messages to the worker process on the other."""
