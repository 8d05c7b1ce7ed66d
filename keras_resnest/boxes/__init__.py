"""Bounding boxes: formats, IoU, offsets, anchors, matching and suppression."""
