"""The parts of a report, which `clae_fast.report` puts together."""
