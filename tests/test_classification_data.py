"""Classification data: folders, batches, mixup, and augmentation against Pillow."""

import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from keras_resnest import data
from keras_resnest.data import (
    ClassificationAugmentation,
    RandAugment,
    classification_batches,
    mix_up,
    read_image_folder,
    read_tfds,
    read_tfds_classification,
    set_epoch,
)
from keras_resnest.data.augmentation import rand_augment as ops

SIDE = (32, 32)


def noise(height, width, seed=0):
    """A smooth image with all gray levels in it."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype("uint8")
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of plain colors; the blue channel tells the index of the image."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(["cat", "dog", "emu"]):
        for i in range(5):
            image = np.full((40 + i, 60, 3), (80 * label, 0, 40 * i), "uint8")
            save(root / "train" / name / f"{i}.png", image)
        save(root / "val" / name / "nested" / "0.jpg", noise(50, 40, label))
    return root


# --- Folders ---------------------------------------------------------------------------------


def test_reads_classes_by_sorted_names(folder):
    train = read_image_folder(folder, "train")
    assert train.class_names == ["cat", "dog", "emu"] and train.num_classes == 3
    assert len(train) == 15 and train.report.class_counts == {"cat": 5, "dog": 5, "emu": 5}
    assert not train.report.problems and "15 images, 3 classes" in str(train.report)
    for element in train.as_dataset().as_numpy_iterator():
        label = int(element["labels"])
        assert element["image_id"].decode().startswith(["cat/", "dog/", "emu/"][label])
        assert element["images"].shape[1:] == (60, 3) and element["images"][0, 0, 0] == 80 * label
    val = read_image_folder(folder, "val", ["emu", "dog", "cat", "yak"])
    labels = [int(element["labels"]) for element in val.as_dataset()]
    assert labels == [2, 1, 0] and val.report.class_counts["yak"] == 0
    assert val.records[0].image_id == "cat/nested/0.jpg"


def test_odd_files_are_reported_and_broken_ones_raise(folder, tmp_path):
    save(tmp_path / "a" / "good.png", noise(20, 20))
    save(tmp_path / "b" / "good.JPG", noise(20, 20))
    (tmp_path / "b" / "notes.txt").write_text("mine")
    (tmp_path / "b" / ".hidden").write_text("")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match="1 x not an image"):
        dataset = read_image_folder(tmp_path)
    assert dataset.class_names == ["a", "b", "empty"] and len(dataset) == 2
    what = {(problem.file, problem.what) for problem in dataset.report.problems}
    assert what == {
        ("notes.txt", "not an image"),
        ("README.md", "file outside of the class folders"),
        ("empty", "class without images"),
    }
    cut = (tmp_path / "b" / "good.JPG").read_bytes()[:-40]
    (tmp_path / "b" / "cut.jpg").write_bytes(cut)
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png"):
        read_image_folder(tmp_path)
    with pytest.warns(UserWarning, match="2 x unreadable image"):
        dataset = read_image_folder(tmp_path, on_error="skip")
    assert [record.image_id for record in dataset.records] == ["a/good.png", "b/good.JPG"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image_folder(folder, "train")


@pytest.mark.parametrize(
    "split, class_names, words",
    [
        (None, None, "`split` must be given if folders are named train, val"),
        ("trian", None, "Nearest: 'train'"),
        ("train", ["cat", "dog"], "unknown class: not in `class_names`"),
        ("train", ["cat", "cat"], "different names"),
        ("train/cat", None, "one folder of images for each class"),
    ],
)
def test_wrong_folders(folder, split, class_names, words):
    with pytest.raises(ValueError, match=words):
        read_image_folder(folder, split, class_names)


def test_missing_folder_and_no_images(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_image_folder(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("")
    with pytest.raises(ValueError, match="No usable image"):
        read_image_folder(tmp_path)


def test_images_of_every_kind_are_read_as_by_load_image(tmp_path):
    image = noise(30, 20)
    (tmp_path / "a").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a" / "turned.jpg", exif=rotated)
    Image.fromarray(image).convert("L").save(tmp_path / "a" / "gray.png")
    Image.fromarray(image).convert("CMYK").save(tmp_path / "a" / "cmyk.jpg")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "a" / "alpha.png")
    dataset = read_image_folder(tmp_path)
    for record, element in zip(dataset.records, dataset.as_dataset(), strict=True):
        np.testing.assert_array_equal(element["images"], data.load_image(record.image))


def test_shards_share_all_images(folder):
    train = read_image_folder(folder, "train")
    shards = [train.shard(4, i) for i in range(4)]
    ids = [record.image_id for shard in shards for record in shard.records]
    assert sorted(ids) == sorted(record.image_id for record in train.records)
    batches = [classification_batches(s, SIDE, 2, training=True, seed=1) for s in shards]
    assert {sum(1 for _ in b) for b in batches} == {1}  # 15 images: the smallest shard has 3
    with pytest.raises(ValueError, match="`num_shards`"):
        train.shard(16, 0)


@pytest.fixture(scope="module")
def tfds_builder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Tints(tfds.core.GeneratorBasedBuilder):
        """Gray images of three tints."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 1)),
                "label": tfds.features.ClassLabel(names=["dark", "gray", "light"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(12), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                image = np.full((16, 20, 1), 100 * (i % 3), "uint8")
                yield i, {"image": image, "label": i % 3}

    builder = Tints(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return builder


def test_tfds_by_builder(tfds_builder):
    names = ["light", "gray", "dark"]
    train = read_tfds_classification(tfds_builder, "train", names)
    assert len(train) == 12 and train.report.class_counts == dict.fromkeys(names, 4)
    seen = set()
    for element in train.as_dataset(shuffle=True, seed=1).as_numpy_iterator():
        assert element["images"].shape == (16, 20, 3)
        assert (element["images"] == 100 * (2 - element["labels"])).all()
        seen.add(element["image_id"])
    assert len(seen) == 12
    halves = [read_tfds_classification(tfds_builder, "train").shard(2, i) for i in range(2)]
    ids = [e["image_id"] for half in halves for e in half.as_dataset().as_numpy_iterator()]
    assert set(ids) == seen and len(ids) == 12
    batches = classification_batches(train, SIDE, 4, training=True, mixup=0.2, seed=1)
    assert sum(len(labels) for _, labels in batches) == 12
    with pytest.raises(ValueError, match="`split` must be one of"):
        read_tfds_classification(tfds_builder, "val")
    with pytest.raises(ValueError, match="'dark', which is not in"):
        read_tfds_classification(tfds_builder, "train", ["light", "gray"])
    with pytest.raises(ValueError, match="not a classification dataset"):
        read_tfds_classification("shapes", "train", data_dir=tfds_builder.data_dir)
    for read in (read_tfds, read_tfds_classification):
        with pytest.raises(ValueError, match="A builder has its own `data_dir`"):
            read(tfds_builder, "train", data_dir="elsewhere")


# --- Batches ---------------------------------------------------------------------------------


def collected(batches):
    pairs = list(batches.as_numpy_iterator())
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def test_evaluation_is_the_center_crop_in_order(folder):
    val = read_image_folder(folder, "val")
    for ratio, interpolation in ((0.875, "bilinear"), (1.0, "bicubic")):
        batches = classification_batches(
            val, SIDE, 2, training=False, crop_ratio=ratio, interpolation=interpolation
        )
        images, labels = collected(batches)
        assert images.dtype == labels.dtype == np.float32
        np.testing.assert_array_equal(labels, np.eye(3))
        for image, record in zip(images, val.records, strict=True):
            expected = data.center_crop_image(
                data.load_image(record.image), 32, ratio, interpolation
            )
            np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(collected(batches)[0], images)  # also from the cache


@pytest.mark.parametrize(
    ("augmentation", "cache"),
    [*((name, False) for name in sorted(data.CLASSIFICATION_AUGMENTATIONS)), ("inception", True)],
)
def test_epochs_by_seed(folder, augmentation, cache):
    train = read_image_folder(folder, "train")

    def batches(seed, **options):
        options |= {"augmentation": augmentation, "cache": cache, "mixup": 0.2, "seed": seed}
        return classification_batches(train, SIDE, 4, training=True, **options)

    one = batches(1)
    first, second = collected(one), collected(one)
    assert first[0].shape == (12, 32, 32, 3) and first[1].shape == (12, 3)
    assert first[0].min() >= 0 and first[0].max() <= 255
    np.testing.assert_allclose(first[1].sum(axis=1), 1.0, rtol=1e-6)
    assert np.any(first[1] != second[1])
    for resumed in (batches(1, initial_epoch=1), one):
        if resumed is one:
            set_epoch(one, 1)
        again = collected(resumed)
        np.testing.assert_array_equal(again[0], second[0])
        np.testing.assert_array_equal(again[1], second[1])
    assert np.any(collected(batches(2))[0] != first[0])


def test_every_image_comes_once_an_epoch(folder):
    train = read_image_folder(folder, "train")
    batches = classification_batches(
        train, SIDE, 4, training=True, augmentation="none", seed=3, drop_remainder=False
    )
    images, labels = collected(batches)
    assert len(images) == 15
    # Plain colors do not change: red tells the class, blue the index of the image.
    assert {(int(i[0, 0, 0]), int(i[0, 0, 2])) for i in images} == {
        (80 * label, 40 * number) for label in range(3) for number in range(5)
    }
    np.testing.assert_array_equal(images[:, 0, 0, 0], 80 * labels.argmax(axis=1))


def test_batches_carry_class_names_and_an_epoch_counter(folder):
    train = read_image_folder(folder, "train")
    for training in (True, False):
        batches = classification_batches(train, SIDE, 4, training=training)
        assert batches.class_names == ["cat", "dog", "emu"]
        set_epoch(batches, 3)


def test_no_full_batch_is_an_error(folder):
    train = read_image_folder(folder, "train")
    with pytest.raises(ValueError, match=r"at least 16 image.*Received: a dataset of 15 image"):
        classification_batches(train, SIDE, 16, training=True)
    with pytest.raises(ValueError, match=r"at least 4 images in each shard.*shard of 3"):
        classification_batches(train.shard(4, 0), SIDE, 4, training=True)
    classification_batches(train, SIDE, 16, training=False)  # keeps the smaller batch


def test_elements_of_unknown_number(tmp_path):
    def generate():
        for i in range(5):
            yield {"images": np.full((8, 9, 3), 50 * i, "uint8"), "labels": i % 2}

    elements = tf.data.Dataset.from_generator(
        generate,
        output_signature={
            "images": tf.TensorSpec((None, None, 3), tf.uint8),
            "labels": tf.TensorSpec((), tf.int32),
        },
    )
    options = {"training": False, "num_classes": 2}
    for cache in (None, tmp_path / "cache"):
        batches = classification_batches(elements, SIDE, 2, cache=cache, **options)
        images, labels = collected(batches)
        assert images[:, 0, 0, 0].tolist() == [0, 50, 100, 150, 200]
        assert labels.argmax(axis=1).tolist() == [0, 1, 0, 1, 0]
    assert list(tmp_path.glob("cache*"))
    with pytest.raises(ValueError, match="at least 6 image"):
        classification_batches(elements, SIDE, 6, training=True, num_classes=2)


def test_own_datasets_and_augmentation():
    elements = tf.data.Dataset.from_tensor_slices(
        {"images": np.zeros((6, 8, 9, 3), "uint8"), "labels": np.arange(6) % 2}
    )
    batches = classification_batches(
        elements,
        SIDE,
        3,
        training=True,
        num_classes=2,
        augmentation=lambda image, seed: tf.fill([32, 32, 3], 7),
    )
    assert len(batches) == 2 and batches.element_spec[0].shape == (3, 32, 32, 3)
    assert (collected(batches)[0] == 7).all()
    with pytest.raises(ValueError, match="`num_classes` is needed"):
        classification_batches(elements, SIDE, 3, training=True)
    with pytest.raises(ValueError, match="at least 7"):
        classification_batches(elements, SIDE, 7, training=True, num_classes=2)
    with pytest.raises(ValueError, match="'rand_augment', or a function"):
        classification_batches(elements, SIDE, 2, training=True, num_classes=2, augmentation="wild")
    with pytest.raises(ValueError, match="`image_shape` must be"):
        classification_batches(elements, (32, 48), 2, training=False, num_classes=2)
    with pytest.raises(ValueError, match="unbatched elements"):
        classification_batches(elements.batch(2), SIDE, 2, training=False, num_classes=2)


# --- Mixup -----------------------------------------------------------------------------------


def test_mixup_blends_labels_as_pixels(folder):
    train = read_image_folder(folder, "train")
    options = {"training": True, "augmentation": "none", "seed": 5}
    plain = collected(classification_batches(train, SIDE, 5, **options))
    images, labels = collected(classification_batches(train, SIDE, 5, mixup=0.4, **options))
    all_weights = []
    for start in range(0, 15, 5):
        x, y = plain[0][start : start + 5], plain[1][start : start + 5]
        for i in range(5):
            partner = (i - 1) % 5
            # The weight, from the pixels in which the two images differ.
            differs = np.abs(x[i] - x[partner]) > 30
            mixed = images[start + i]
            weights = ((mixed - x[partner]) / (x[i] - x[partner] + 1e-9))[differs]
            if not weights.size:
                continue
            assert np.ptp(weights) < 1e-4
            expected = weights[0] * y[i] + (1 - weights[0]) * y[partner]
            np.testing.assert_allclose(labels[start + i], expected, atol=1e-5)
            all_weights.append(weights[0])
    assert len(all_weights) >= 10 and np.ptp(all_weights) > 0.3


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 8.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    images, labels = tf.reshape(tf.one_hot([0, 1], 2), (2, 1, 1, 2)), tf.one_hot([0, 1], 2)
    images = tf.tile(images, [5000, 1, 1, 1])
    labels = tf.tile(labels, [5000, 1])
    mixed, mixed_labels = mix_up(images, labels, alpha, (3, 4))
    np.testing.assert_array_equal(mixed[:, 0, 0], mixed_labels)
    weights = tf.reduce_sum(mixed_labels * labels, axis=1).numpy()
    assert np.isfinite(weights).all()
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_keras_mixup_agrees():
    """The layer of Keras is correct too, with its own draws."""
    images = np.arange(8, dtype="float32").reshape(8, 1, 1, 1) * np.ones((8, 2, 2, 3), "float32")
    batch = {"images": images, "labels": np.eye(8, dtype="float32")}
    mixed = keras.layers.MixUp(0.4, seed=1)(batch, training=True)
    np.testing.assert_allclose(
        np.asarray(mixed["labels"]) @ np.arange(8), mixed["images"][:, 0, 0, 0], atol=1e-5
    )


# --- Random crops ----------------------------------------------------------------------------


def test_windows_have_the_areas_and_ratios_asked_for():
    augmentation = ClassificationAugmentation(SIDE, area=(0.2, 0.6), aspect_ratio=(0.5, 2.0))
    size = (300, 300)
    seeds = tf.stack([tf.range(500, dtype=tf.int64), tf.zeros(500, tf.int64)], axis=1)
    windows = tf.map_fn(
        lambda seed: augmentation.window(size, seed), seeds, fn_output_signature=tf.int32
    )
    top, left, height, width = windows.numpy().T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 300).all() and (left + width <= 300).all()
    fractions, ratios = height * width / 90_000, width / height
    assert 0.195 < fractions.min() < 0.22 and 0.55 < fractions.max() < 0.605
    assert 0.49 < ratios.min() < 0.55 and 1.8 < ratios.max() < 2.03
    # In a square, ratios are symmetric about 1 and places about the center.
    assert abs((ratios < 1).mean() - 0.5) < 0.1
    assert abs((left / (300 - width + 1e-9)).mean() - 0.5) < 0.06


@pytest.mark.parametrize(
    "size, expected", [((10, 1000), (10, 13)), ((1000, 9), (12, 9)), ((1, 1), (1, 1))]
)
def test_narrow_images_give_their_center(size, expected):
    augmentation = ClassificationAugmentation(SIDE)
    top, left, height, width = augmentation.window(size, (1, 2)).numpy()
    assert (height, width) == expected
    assert abs(2 * top + height - size[0]) <= 1 and abs(2 * left + width - size[1]) <= 1
    image = augmentation(tf.zeros((*size, 3), tf.uint8), (1, 2))
    assert image.shape == (32, 32, 3) and not np.any(image)


def test_the_crop_is_the_window_flipped_or_not():
    # Red tells the column, green the row.
    image = np.zeros((200, 200, 3), "uint8")
    image[..., 0], image[..., 1] = np.arange(200)[None], np.arange(200)[:, None]
    augmentation = ClassificationAugmentation(SIDE, area=(0.3, 0.9))
    flipped = []
    for i in range(20):
        seed = (i, 7)
        window_seed = tf.random.split(tf.constant(seed, tf.int64), 5)[0]
        top, left, height, width = augmentation.window((200, 200), window_seed).numpy()
        crop = augmentation(image, seed).numpy()
        columns, rows = crop[16, :, 0], crop[:, 16, 1]
        if columns[0] > columns[-1]:
            columns = columns[::-1]
            flipped.append(i)
        centers = (np.arange(32) + 0.5) / 32
        # Away from the edges, where antialiasing sees fewer pixels.
        np.testing.assert_allclose(columns[2:-2], (left + centers * width - 0.5)[2:-2], atol=0.6)
        np.testing.assert_allclose(rows[2:-2], (top + centers * height - 0.5)[2:-2], atol=0.6)
    assert 4 <= len(flipped) <= 16


def test_colors_change_within_their_ranges():
    gray = tf.fill([40, 40, 3], tf.constant(100, tf.uint8))
    jitter = ClassificationAugmentation(SIDE, color_jitter=0.4)
    values = [float(jitter(gray, (i, 0))[0, 0, 0]) for i in range(60)]
    # Contrast and saturation do not change plain gray: 100 times 0.6 to 1.4.
    assert 59.5 < min(values) < 70 and 130 < max(values) < 140.5
    noisy = ClassificationAugmentation(SIDE, lighting=0.1)
    colors = np.array([noisy(gray, (i, 0))[0, 0].numpy() for i in range(200)]) - 100
    # The covariance of alpha * eigenvector with standard deviations 0.1 * eigenvalue.
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140]])
    expected = 0.01 * sum(
        value**2 * np.outer(v, v)
        for value, v in zip(
            (55.46, 4.794, 1.148), np.vstack([vectors, [-0.5836, -0.6948, 0.4203]]).T, strict=True
        )
    )
    np.testing.assert_allclose(np.cov(colors.T), expected, rtol=0.3, atol=1.0)


@pytest.mark.parametrize(
    "arguments",
    [{"area": (0.0, 1.0)}, {"aspect_ratio": (2.0, 1.0)}, {"flip": 1.5}, {"lighting": -1.0}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="Received"):
        ClassificationAugmentation(SIDE, **arguments)
    with pytest.raises(ValueError, match="magnitude"):
        RandAugment(magnitude=31)


# --- RandAugment against Pillow --------------------------------------------------------------

# Narrower than 0 to 255, so that auto contrast changes it.
IMAGE = (noise(48, 60, seed=3) * 0.75 + 20).astype("uint8")
PILLOW = Image.fromarray(IMAGE)


def by_pillow(name, sign, strength):
    factor = 1 + 0.9 * strength * sign
    affine = {
        "shear_x": (1, sign * strength * 0.3, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * strength * 0.3, 1, 0),
        "translate_x": (1, 0, sign * strength * 0.45 * 60, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * strength * 0.45 * 48),
    }
    if name in affine:
        return PILLOW.transform(
            PILLOW.size, Image.Transform.AFFINE, affine[name], Image.Resampling.BILINEAR
        )
    return {
        "identity": lambda: PILLOW,
        "rotate": lambda: PILLOW.rotate(sign * strength * 30, Image.Resampling.BILINEAR),
        "brightness": lambda: ImageEnhance.Brightness(PILLOW).enhance(factor),
        "color": lambda: ImageEnhance.Color(PILLOW).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(PILLOW).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(PILLOW).enhance(factor),
        "posterize": lambda: ImageOps.posterize(PILLOW, 8 - round(4 * strength)),
        "solarize": lambda: ImageOps.solarize(PILLOW, 256 * (1 - strength)),
        "auto_contrast": lambda: ImageOps.autocontrast(PILLOW),
        "equalize": lambda: ImageOps.equalize(PILLOW),
    }[name]()


@pytest.mark.parametrize("name", sorted(ops.OPERATIONS))
@pytest.mark.parametrize("sign, strength", [(1.0, 0.4), (-1.0, 0.4), (1.0, 1.0), (-1.0, 1.0)])
def test_operations_equal_those_of_pillow(name, sign, strength):
    ours = ops.OPERATIONS[name](tf.constant(IMAGE), strength, sign)
    theirs = np.asarray(by_pillow(name, sign, strength)).astype(int)
    assert ours.dtype == tf.uint8 and ours.shape == IMAGE.shape
    difference = np.abs(ours.numpy().astype(int) - theirs)
    # At the border Pillow turns black at once; ours blends over one pixel.
    moved = name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
    allowed = 0.05 if moved else 0.0
    assert (difference > 2).mean() <= allowed, difference.max()
    if name != "identity":
        assert np.any(theirs != IMAGE), "the operation must change the image"


def test_flat_images_stay_finite():
    for value in (0, 128, 255):
        flat = Image.new("RGB", (8, 9), (value, value, value))
        for name, theirs in (
            ("auto_contrast", ImageOps.autocontrast(flat)),
            ("equalize", ImageOps.equalize(flat)),
        ):
            ours = ops.OPERATIONS[name](tf.constant(np.asarray(flat)), 1.0, 1.0)
            np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_rand_augment_draws_all_operations_by_seed():
    image = tf.constant(IMAGE)
    call = tf.function(RandAugment(num_ops=1, magnitude=12))
    seeds = tf.stack([tf.range(150, dtype=tf.int64), tf.zeros(150, tf.int64)], axis=1)
    drawn = np.stack([call(image, seed).numpy() for seed in seeds]).astype(int)
    known = np.zeros(len(drawn), bool)
    for name, op in ops.OPERATIONS.items():
        for sign in (-1.0, 1.0):
            outcome = op(image, 0.4, sign).numpy().astype(int)
            same = (np.abs(drawn - outcome) <= 1).all(axis=(1, 2, 3))
            assert same.any(), f"{name} is never drawn in the direction {sign}"
            known |= same
    assert known.all()
    two = RandAugment(num_ops=2)
    np.testing.assert_array_equal(two(image, (5, 6)), two(image, (5, 6)))
    np.testing.assert_array_equal(RandAugment(num_ops=0)(image, (5, 6)), IMAGE)


def test_why_not_keras_rand_augment():
    """At the magnitude of ResNeSt, that of Keras rotates by up to 144 degrees, in one direction."""
    layer = keras.layers.RandAugment(factor=12 / 30, seed=1).random_rotation
    angles = [
        float(layer.get_random_transformation(np.zeros((1, 8, 8, 3)), training=True)["angle"][0])
        for _ in range(40)
    ]
    assert min(angles) >= 0 and 60 < max(angles) <= 144 + 1e-3
    assert math.isclose(30 * 12 / 30, 12.0)  # degrees in the paper
