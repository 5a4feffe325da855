"""Pure functions of arrays: a plain reference, the backends, and one dispatch for each op."""
