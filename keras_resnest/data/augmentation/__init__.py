"""Augmentation of images and their boxes, by `tf.data`."""
