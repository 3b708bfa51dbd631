"""Figures: COCO's average precision and recall, and the multi-scale test."""
