"""Kinds of distillation: one file each."""
