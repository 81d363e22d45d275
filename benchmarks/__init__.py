"""Measured claims: every ratio against a peer timed in the same process, interleaved with ours."""
