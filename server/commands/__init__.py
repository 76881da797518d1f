"""Commands that talk to a running server: one function each, light to import."""
