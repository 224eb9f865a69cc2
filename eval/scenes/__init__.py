"""Scenes: pictures of COCO categories with ground truth, rendered from a seed."""
