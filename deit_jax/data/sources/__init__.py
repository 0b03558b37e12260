"""Where images come from: random access behind one small interface."""
