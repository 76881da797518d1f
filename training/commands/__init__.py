"""Commands of the `layerskip` program that work on checkpoints, one function in each module."""
