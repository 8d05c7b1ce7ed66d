"""Datasets as annotation tools write them: the cases of shared/cases, run from expected.json."""

import inspect
import json
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from keras_resnest import data
from keras_resnest.data.readers.common import UNANNOTATED

CASES = SHARED / "cases"
EXPECTED = json.loads((CASES / "expected.json").read_text()) if CASES.is_dir() else {}
OUTCOMES = ("images", "class_names", "splits", "problems", "error")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    if not EXPECTED:
        pytest.skip("the folder shared/cases is not beside the project")
    target = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, CASES / "make_cases.py", target], check=True)
    return target


def read(folder: Path, step: dict):
    """Reads as a step says; returns a list of datasets, or of splits."""
    reader = getattr(data, step.get("reader", "read_detection"))
    arguments = dict(step.get("arguments", {}))
    if "split" in step:
        arguments["split"] = step["split"]
    if "image_folder" in arguments:
        arguments["image_folder"] = folder / arguments["image_folder"]
    if "option" in step:
        words, values = step["option"]["name_has"], step["option"]["values"]
        names = inspect.signature(reader).parameters
        name = next(name for name in names if any(word in name for word in words))
        arguments[name] = next(value for value in values if value in UNANNOTATED)
    result = reader(folder / step["source"], **arguments)
    then = step.get("then")
    if then == "train":
        next(iter(data.training_batches(result, (64, 64), 2, seed=1)))
    elif then and "hold_out" in then:
        options = then["hold_out"]
        return [result, *result.hold_out(options["share"], seed=options["seed"])]
    elif then:
        return [result, *(result.shard(then["shard"], i) for i in range(then["shard"]))]
    return [result]


def objects(dataset, folder: Path) -> dict:
    """Boxes and class of every image, by the path of its file."""
    found = {}
    for record in dataset.records:
        name = unicodedata.normalize("NFC", Path(record.image).relative_to(folder).as_posix())
        assert name not in found
        labels = [dataset.class_names[label] for label in record.labels]
        found[name] = sorted(zip(record.boxes.tolist(), labels, strict=True))
    return found


def check(results: list, wanted: dict, folder: Path) -> None:
    """Compares what was read with one outcome."""
    if "splits" in wanted:
        assert results[0] == wanted["splits"]
    if "class_names" in wanted:
        assert results[0].class_names == wanted["class_names"]
    if "images" in wanted:
        found = objects(results[0], folder)
        assert sorted(found) == sorted(
            unicodedata.normalize("NFC", name) for name in wanted["images"]
        )
        for name, rows in wanted["images"].items():
            pairs = found[unicodedata.normalize("NFC", name)]
            rows = sorted((row[:4], row[4]) for row in rows)
            assert [label for _, label in pairs] == [label for _, label in rows]
            for (box, _), (right, _) in zip(pairs, rows, strict=True):
                np.testing.assert_allclose(box, right, atol=0.01)
    if "problems" in wanted:
        problems, *parts = [[str(p) for p in result.report.problems] for result in results]
        assert len(problems) >= wanted["problems"]["at_least"]
        for word in wanted["problems"].get("words", ()):
            assert word in " ".join(problems)
        for problem in problems if parts else ():
            assert any(problem in part for part in parts)


def check_step(folder: Path, step: dict) -> None:
    outcomes = [{key: step[key] for key in OUTCOMES if key in step}, *step.get("or", [])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results = read(folder, step)
    except ValueError as error:
        assert "error" in step, error
        message = str(error).replace(str(folder), "")
        for words in step["error"]:
            words = [words] if isinstance(words, str) else words
            assert any(word in message for word in words), message
        return
    assert "error" not in step or step.get("either"), "it must be refused"
    for outcome in outcomes[:-1]:
        try:
            return check(results, outcome, folder)
        except AssertionError:
            continue
    check(results, outcomes[-1], folder)


@pytest.mark.parametrize("name", EXPECTED)
def test_case(cases, name):
    for step in EXPECTED[name]:
        check_step(cases / name, step)


def test_there_are_cases(cases):
    assert len(EXPECTED) == 34
