"""Augmentation of images and their labels, as TensorFlow graph code for `tf.data`."""
