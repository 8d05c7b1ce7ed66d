"""Boxes: formats, overlap, offsets, anchors, matching, suppression. Each idea once."""
