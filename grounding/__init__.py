"""Grounding: image + phrases → regions (boxes, masks) and region tokens."""
