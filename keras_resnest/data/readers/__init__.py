"""Readers: one file for each annotation format."""
