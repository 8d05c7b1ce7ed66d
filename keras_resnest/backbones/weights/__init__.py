"""Pretrained weights: the table, downloads, checks and names."""
