"""Microbenchmarks of the token ops against the eager PyTorch that a user would write. See bench/README.md."""
