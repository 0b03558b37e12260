"""A page to drop an image on: what weights answer and what their tokens read; `deit demo`."""
