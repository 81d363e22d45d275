"""The stages of `python -m benchmarks.gpu_suite`, its peers and its file of results."""
