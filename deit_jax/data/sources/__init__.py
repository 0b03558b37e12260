"""Sources of images: random access behind one small interface."""
