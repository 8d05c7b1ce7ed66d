"""Class names and crops of classifiers."""

import numpy as np
import pytest
from PIL import Image

from keras_resnest.backbones import decode_predictions, preprocess_input
from keras_resnest.data import center_crop_image


def test_preprocess_input():
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype="uint8")
    assert preprocess_input(x) is x
    normalized = preprocess_input(x, mode="torch")
    want = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalized, want, atol=1e-5)
    assert x.dtype == "uint8"
    with pytest.raises(ValueError, match="`mode` must be"):
        preprocess_input(x, mode="caffe")


def test_decode_predictions():
    names = ["ape", "bee", "cat"]
    found = decode_predictions([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], 2, names)
    assert found == [[(1, "bee", 0.5), (2, "cat", 0.3)], [(0, "ape", 0.4), (2, "cat", 0.4)]]
    for wrong, top in (([0.2, 0.5, 0.3], 2), ([[0.1, 0.9]], 2), ([[0.2, 0.5, 0.3]], 4)):
        with pytest.raises(ValueError, match="Received"):
            decode_predictions(wrong, top, names)
    with pytest.raises(ValueError, match=r"\(batch, 1000\)"):
        decode_predictions([[0.1, 0.9]])


def test_center_crop():
    image = np.zeros((100, 200, 3), "uint8")
    image[:, 50:150] = (np.arange(100)[None, :, None] * 2).astype("uint8")  # the middle square
    crop = center_crop_image(image, 100, crop_ratio=1.0)
    assert np.array_equal(crop, image[:, 50:150])
    # 87.5 %: the shorter side becomes 64, of which the middle 56 are cut.
    crop = center_crop_image(image, 56)
    want = Image.fromarray(image).resize((128, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(crop, np.asarray(want)[4:60, 36:92])
    assert center_crop_image(image[:1, :1], 7).shape == (7, 7, 3)
    for options in ({"crop_size": 0}, {"crop_size": 8, "crop_ratio": 1.5}):
        with pytest.raises(ValueError, match="Received"):
            center_crop_image(image, **options)
