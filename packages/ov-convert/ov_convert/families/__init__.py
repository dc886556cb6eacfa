"""Name maps and fields of published model families, one module per family."""
