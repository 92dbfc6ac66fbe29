"""Studies: a protocol from configuration to rows, resumable, and on to tables and figures."""
