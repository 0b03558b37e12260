"""ViT and its teachers: one file, one family."""
