"""Small numeric routines. They need numpy only, and each one has a slow, readable reference (see README.md)."""
