"""Makes, heals and looks inside checkpoints; only the command line reaches it, lazily."""
