"""`deit prepare`: images into a TFDS data set, without TensorFlow."""
