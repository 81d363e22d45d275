"""What a report is made of: `clae_fast.report` puts it together."""
