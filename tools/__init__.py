"""Commands over the library: python -m tools.NAME --help."""
