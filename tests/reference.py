"""Brute-force definitions of what the package computes, in float64.

Independent of the package: slow, short and easy to check against the papers.
"""

import math

import numpy as np


def iou(boxes1, boxes2):
    """Intersection over union of every pair of "xyxy" boxes, (M, N); 0 without overlap."""
    boxes1 = np.reshape(boxes1, (-1, 1, 4)).astype("float64")
    boxes2 = np.reshape(boxes2, (1, -1, 4)).astype("float64")
    sides = np.minimum(boxes1[..., 2:], boxes2[..., 2:]) - np.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    overlap = np.maximum(sides, 0).prod(axis=-1)
    area1, area2 = ((boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (boxes1, boxes2))
    union = area1 + area2 - overlap
    return np.divide(overlap, union, out=np.zeros_like(union), where=overlap > 0)


def match_greedily(iou):
    """Takes the pair of highest IoU, again and again; each object and anchor once.

    Of equal pairs the first object, then the first anchor wins. Pairs of IoU 0 are not taken.
    Returns the object of each anchor, or -1.
    """
    iou = np.array(iou)
    matches = np.full(iou.shape[1], -1)
    while iou.size and iou.max() > 0:
        best_object, anchor = np.unravel_index(iou.argmax(), iou.shape)
        matches[anchor] = best_object
        iou[best_object], iou[:, anchor] = 0, 0
    return matches


def match(iou, valid=True, threshold=0.5, force_match=True):
    """The object of each anchor, or -1, from the IoU (objects, anchors) of one image."""
    iou = np.array(iou) * np.reshape(valid, (-1, 1))
    if not len(iou):
        return np.full(iou.shape[1], -1)
    matches = np.where(iou.max(axis=0) >= threshold, iou.argmax(axis=0), -1)
    forced = match_greedily(iou)
    return np.where(forced >= 0, forced, matches) if force_match else matches


def centers_and_sizes(boxes):
    """Centers and sizes of "xyxy" boxes, both (..., 2)."""
    boxes = np.asarray(boxes, "float64")
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode(boxes, anchors, variances=(0.1, 0.2), epsilon=1e-5):
    """Offsets (..., 4) from anchors to boxes: SSD, equation 2."""
    centers, sizes = centers_and_sizes(boxes)
    anchor_centers, anchor_sizes = centers_and_sizes(anchors)
    offsets = (centers - anchor_centers) / anchor_sizes / variances[0]
    return np.concatenate([offsets, np.log(sizes / anchor_sizes + epsilon) / variances[1]], -1)


def decode(offsets, anchors, variances=(0.1, 0.2)):
    """Boxes (..., 4) from offsets and anchors; a box is at most 62.5 times its anchor."""
    offsets = np.asarray(offsets, "float64")
    centers, sizes = centers_and_sizes(anchors)
    centers = centers + offsets[..., :2] * variances[0] * sizes
    sizes = sizes * np.minimum(np.exp(offsets[..., 2:] * variances[1]), 62.5)
    return np.concatenate([centers - sizes / 2, centers + sizes / 2], -1)


def softmax(logits):
    """Probabilities over the last axis."""
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def diou(boxes1, boxes2):
    """Distance IoU of every pair of "xyxy" boxes, (M, N): arXiv 1911.08287, equation 7."""
    boxes1 = np.reshape(boxes1, (-1, 1, 4)).astype("float64")
    boxes2 = np.reshape(boxes2, (1, -1, 4)).astype("float64")
    (centers1, _), (centers2, _) = centers_and_sizes(boxes1), centers_and_sizes(boxes2)
    hull = np.maximum(boxes1, boxes2)[..., 2:] - np.minimum(boxes1, boxes2)[..., :2]
    diagonal = np.maximum((hull**2).sum(axis=-1), 1e-7)
    return iou(boxes1, boxes2) - ((centers1 - centers2) ** 2).sum(axis=-1) / diagonal


def suppress(boxes, confidence, labels, iou_threshold, suppression="greedy", class_agnostic=False):
    """Greedy non-maximum suppression within each class: kept rows, most confident first."""
    overlaps, kept = (diou if suppression == "diou" else iou)(boxes, boxes), []
    for i in np.argsort(-np.asarray(confidence), kind="stable").tolist():
        rivals = [k for k in kept if class_agnostic or labels[k] == labels[i]]
        if all(overlaps[k, i] <= iou_threshold for k in rivals):
            kept.append(i)
    return kept


def soften(
    boxes,
    confidence,
    labels,
    iou_threshold,
    confidence_threshold,
    class_agnostic=False,
    passes=None,
):
    """Linear soft suppression: the chosen rows, in order, and the confidence of all rows.

    Takes the most confident waiting row; it multiplies the confidence of each other waiting row
    of its class, and of another pass, with an IoU above the threshold by 1 - IoU.
    """
    passes = range(len(boxes)) if passes is None else passes
    overlaps, confidence = iou(boxes, boxes), np.array(confidence, "float64")
    chosen, waiting = [], set(range(len(confidence)))
    limits = np.zeros(len(confidence)) + confidence_threshold
    while waiting := {i for i in waiting if confidence[i] > limits[i]}:
        best = max(waiting, key=lambda i: (confidence[i], -i))
        chosen.append(best)
        waiting.remove(best)
        for i in waiting:
            rivals = (class_agnostic or labels[i] == labels[best]) and passes[i] != passes[best]
            if rivals and overlaps[best, i] > iou_threshold:
                confidence[i] *= 1 - overlaps[best, i]
    return chosen, confidence


def vote(boxes, confidence, voting_iou):
    """The mean of each box's neighbors, weighted by confidence (arXiv 1505.01749, section 5)."""
    overlaps, placed = iou(boxes, boxes), np.array(boxes, "float64")
    for i in range(len(boxes)):
        voters = [j for j in range(len(boxes)) if overlaps[i, j] >= voting_iou]
        if voters:  # a box without area does not overlap itself
            placed[i] = np.average(boxes[voters], axis=0, weights=confidence[voters])
    return placed


def decode_detections(
    outputs,
    anchors,
    objectness_threshold=0.01,
    confidence_threshold=0.01,
    iou_threshold=0.45,
    pre_nms_top_k=400,
    max_detections=200,
    suppression="greedy",
    class_agnostic=False,
    alpha=0.5,
    voting_iou=None,
    exclusive_classes=False,
):
    """Detections of one image: rows of (confidence, label, box), most confident first.

    `outputs` maps the names of the raw outputs to arrays (anchors, ...) of one image. A dictionary
    of confidence thresholds has the labels as text for keys.
    """
    limits = confidence_threshold
    if isinstance(limits, dict):
        limits = [limits[str(label)] for label in range(len(limits))]
    limits = np.zeros(outputs["odm_logits"].shape[-1] - 1) + limits
    boxes = decode(outputs["odm_boxes"], decode(outputs["arm_boxes"], anchors))
    confidence = softmax(outputs["odm_logits"])[:, 1:]
    if "odm_iou" in outputs:
        predicted_iou = 1 / (1 + np.exp(-outputs["odm_iou"].astype("float64")))
        confidence = confidence**alpha * predicted_iou ** (1 - alpha)
    confidence[softmax(outputs["arm_objectness"])[:, 1] <= objectness_threshold] = 0
    best, columns = confidence.argmax(axis=1), confidence.T
    if class_agnostic:
        columns = [confidence.max(axis=1)]
    detections = []
    for label, column in enumerate(columns):
        order = np.argsort(-column, kind="stable")
        labels = best if class_agnostic else np.full(len(best), label)
        order = order[column[order] > limits[labels[order]]][:pre_nms_top_k]
        rows = boxes[order], column[order], np.zeros(len(order))
        if suppression == "soft":
            kept, final = soften(*rows, iou_threshold, limits[labels[order]])
        else:
            kept, final = suppress(*rows, iou_threshold, suppression), column[order]
        placed = vote(*rows[:2], voting_iou) if voting_iou is not None else rows[0]
        detections += [(final[i], labels[order[i]], placed[i].tolist()) for i in kept]
    detections = sorted(detections, reverse=True)[:max_detections]
    if exclusive_classes and detections:
        lowered = compete(*zip(*detections, strict=True), iou_threshold)
        rows = [(c, *d[1:]) for c, d in zip(lowered, detections, strict=True)]
        detections = sorted((row for row in rows if row[0] > limits[row[1]]), reverse=True)
    return detections


def compete(confidence, labels, boxes, iou_threshold):
    """The confidence of each detection where each object has one class."""
    overlaps, lowered = iou(boxes, boxes), list(confidence)
    for i, j in np.argwhere(overlaps > iou_threshold).tolist():
        if labels[i] != labels[j] and confidence[j] > confidence[i]:
            lowered[i] *= math.sqrt(1 - confidence[j])
    return lowered


def average_precision(ground_truth, detections, label, threshold=0.5, interpolation="every_point"):
    """PASCAL VOC average precision, true positives and false positives of one class.

    `ground_truth` holds one {"boxes", "labels", "difficult"} per image, `detections` one
    {"boxes", "labels", "confidence"}. `interpolation` is "every_point" or "eleven_point".
    The average precision of a class without objects is None.
    """
    rows = [
        (-confidence, image, row)
        for image, found in enumerate(detections)
        for row, confidence in enumerate(found["confidence"])
        if found["labels"][row] == label
    ]
    taken, hits = set(), []
    for _, image, row in sorted(rows):  # equal confidence: in the order of images and rows
        truth, box = ground_truth[image], detections[image]["boxes"][row]
        overlaps = iou(box, truth["boxes"])[0] * (np.array(truth["labels"]) == label)
        if not len(overlaps) or overlaps.max() == 0 or overlaps.max() < threshold:
            hits.append(0)
            continue
        best = int(overlaps.argmax())
        if not truth["difficult"][best]:  # detections of difficult objects do not count
            hits.append(int((image, best) not in taken))
            taken.add((image, best))
    num_objects = sum(
        int(own == label and not difficult)
        for truth in ground_truth
        for own, difficult in zip(truth["labels"], truth["difficult"], strict=True)
    )
    found = np.cumsum(hits).tolist()
    num_found = found[-1] if found else 0
    if num_objects == 0:
        return None, 0, len(hits)
    points = [(tp, tp / rank) for rank, tp in enumerate(found, 1)]
    if interpolation == "eleven_point":
        wanted = [[p for tp, p in points if 10 * tp >= k * num_objects] for k in range(11)]
        area = sum(max(precisions, default=0.0) for precisions in wanted) / 11
    else:
        wanted = [[p for tp, p in points if tp >= k] for k in range(1, num_found + 1)]
        area = sum(max(precisions) for precisions in wanted) / num_objects
    return area, num_found, len(hits) - num_found


def bilinear(feature_map, x, y):
    """Value of a map (height, width, channels) at a point; pixel (0, 0) has its center at 0.5.

    Outside of the map everything is zero.
    """
    height, width, _ = feature_map.shape
    rows = np.maximum(0, 1 - np.abs(y - np.arange(height) - 0.5))
    columns = np.maximum(0, 1 - np.abs(x - np.arange(width) - 0.5))
    return np.einsum("i,j,ijc->c", rows, columns, feature_map)


def aligned_convolution(features, boxes, kernel, bias, num_anchors):
    """RefineDet++: every box (batch, cells * num_anchors, 4) reads 3x3 points inside it."""
    kernels = np.reshape(kernel, (3, 3, -1, num_anchors, kernel.shape[-1] // num_anchors))
    outputs = np.tile(np.reshape(bias, (num_anchors, -1)), (1, boxes.shape[1] // num_anchors, 1))
    outputs = np.repeat(outputs, len(boxes), axis=0).astype("float64")
    for image, row in np.ndindex(boxes.shape[:2]):
        left, top, right, bottom = boxes[image, row]
        for j, i in np.ndindex(3, 3):
            x = left + (right - left) * (2 * i + 1) / 6
            y = top + (bottom - top) * (2 * j + 1) / 6
            value = bilinear(features[image], x, y)
            outputs[image, row] += value @ kernels[j, i, :, row % num_anchors]
    return outputs
