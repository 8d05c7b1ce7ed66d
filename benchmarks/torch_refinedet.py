"""RefineDet on ResNeSt in PyTorch, the peer that `training_step.py` compares with.

The backbone is the authors' own, from the package `resnest`. Modules are named as in the PyTorch
ports of RefineDet, so that `keras_resnest.backbones.load_torch_state_dict` copies the weights
into our model. Matching and loss are those of the ports, over the whole batch at once, with the
negatives filtered as in the paper.
"""

import math

import resnest.torch
import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (8, 16, 32, 64)
ANCHOR_SIZES = (32, 64, 128, 256)
ASPECT_RATIOS = (1.0, 2.0, 0.5)
VARIANCES = (0.1, 0.2)
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STANDARD_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
PRETRAINED_WIDTHS = (512, 1024, 2048)  # channels of the backbone at strides 8, 16, 32


class L2Norm(nn.Module):
    def __init__(self, channels, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x):
        length = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        return x / length * self.weight[:, None, None]


class RefineDet(nn.Module):
    """Raw outputs for images (batch, 3, height, width), 0 to 255: the offsets and class logits
    of both stages, each (batch, anchors, n)."""

    def __init__(self, num_classes, backbone="resnest50"):
        super().__init__()
        self.num_classes = num_classes
        self.model = getattr(resnest.torch, backbone)()
        del self.model.fc
        for name, values in (("mean", IMAGENET_MEAN), ("deviation", IMAGENET_STANDARD_DEVIATION)):
            tensor = torch.tensor(values)[:, None, None]
            self.register_buffer(name, tensor, persistent=False)
        sources = (*PRETRAINED_WIDTHS, 512)
        self.conv4_3_L2Norm = L2Norm(sources[0], 10)
        self.conv5_3_L2Norm = L2Norm(sources[1], 8)
        self.extras = nn.ModuleList(
            [nn.Conv2d(sources[2], 256, 1), nn.Conv2d(256, 512, 3, stride=2, padding=1)]
        )
        anchors = len(ASPECT_RATIOS)
        self.arm_loc = _heads(sources, anchors * 4)
        self.arm_conf = _heads(sources, anchors * 2)
        self.odm_loc = _heads((256,) * 4, anchors * 4)
        self.odm_conf = _heads((256,) * 4, anchors * (num_classes + 1))
        self.tcb0, self.tcb1, self.tcb2 = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for channels in sources:
            self.tcb0.extend([_conv3(channels, 256), nn.ReLU(), _conv3(256, 256)])
            self.tcb2.extend([nn.ReLU(), _conv3(256, 256), nn.ReLU()])
        self.tcb1.extend(nn.ConvTranspose2d(256, 256, 2, stride=2) for _ in sources[1:])

    def forward(self, images):
        net = self.model
        x = (images - self.mean) / self.deviation
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        c3 = net.layer2(x)
        c4 = net.layer3(c3)
        c5 = net.layer4(c4)
        c6 = F.relu(self.extras[1](F.relu(self.extras[0](c5))))
        sources = [self.conv4_3_L2Norm(c3), self.conv5_3_L2Norm(c4), c5, c6]
        transferred = self._transfer(sources)
        return {
            "arm_boxes": _predict(self.arm_loc, sources, 4),
            "arm_objectness": _predict(self.arm_conf, sources, 2),
            "odm_boxes": _predict(self.odm_loc, transferred, 4),
            "odm_logits": _predict(self.odm_conf, transferred, self.num_classes + 1),
        }

    def _transfer(self, sources):
        maps, upper = [], None
        for level in range(len(sources) - 1, -1, -1):
            first = 3 * level
            x = self.tcb0[first + 2](F.relu(self.tcb0[first](sources[level])))
            if upper is not None:
                x = x + self.tcb1[level](upper)
            upper = F.relu(self.tcb2[first + 1](F.relu(x)))
            maps.insert(0, upper)
        return maps


def _conv3(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _heads(channels, outputs):
    return nn.ModuleList(_conv3(c, outputs) for c in channels)


def _predict(heads, maps, width):
    rows = [head(x).permute(0, 2, 3, 1).flatten(1) for head, x in zip(heads, maps, strict=True)]
    return torch.cat(rows, dim=1).unflatten(1, (-1, width))


def make_anchors(side):
    """`"xyxy"` in pixels, (anchors, 4), over level, row, column, aspect ratio."""
    levels = []
    for stride, size in zip(STRIDES, ANCHOR_SIZES, strict=True):
        centers = (torch.arange(side // stride) + 0.5) * stride
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        for_ratios = []
        for ratio in ASPECT_RATIOS:
            half_width, half_height = size * math.sqrt(ratio) / 2, size / math.sqrt(ratio) / 2
            box = [x - half_width, y - half_height, x + half_width, y + half_height]
            for_ratios.append(torch.stack(box, dim=-1))
        levels.append(torch.stack(for_ratios, dim=2).reshape(-1, 4))
    return torch.cat(levels)


def pairwise_iou(boxes, anchors):
    """(batch, objects, 4) with (..., anchors, 4): (batch, objects, anchors)."""
    boxes, anchors = boxes[:, :, None], anchors[..., None, :, :]
    top_left = torch.maximum(boxes[..., :2], anchors[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], anchors[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, anchors)]
    return intersection / (areas[0] + areas[1] - intersection)


def encode_targets(boxes, classes, anchors):
    """Offsets (batch, anchors, 4) and classes (batch, anchors), 0 for background.

    All rows of `boxes` are objects: there is no padding.
    """
    iou = pairwise_iou(boxes, anchors)
    best_iou, best = iou.max(dim=1)
    pair_one_to_one(iou, best_iou, best)
    matched = boxes.gather(1, best[..., None].expand(-1, -1, 4))
    targets = torch.where(best_iou >= 0.5, classes.gather(1, best), 0)
    centers, sizes = _center_form(matched)
    anchor_centers, anchor_sizes = _center_form(anchors)
    offsets = (centers - anchor_centers) / (VARIANCES[0] * anchor_sizes)
    log_sizes = torch.log(sizes / anchor_sizes + 1e-5) / VARIANCES[1]
    return torch.cat([offsets, log_sizes], dim=-1), targets


def pair_one_to_one(iou, best_iou, best):
    """Gives every object its best free anchor, by falling IoU; changes all its arguments."""
    images = torch.arange(len(iou))
    for _ in range(iou.shape[1]):
        highest, pair = iou.flatten(1).max(dim=1)
        number, anchor = pair // iou.shape[2], pair % iou.shape[2]
        overlaps = highest > 0
        best[images, anchor] = torch.where(overlaps, number, best[images, anchor])
        best_iou[images, anchor] = torch.where(overlaps, 2.0, best_iou[images, anchor])
        iou[images, number], iou[images, :, anchor] = -1.0, -1.0


def _center_form(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def decode_boxes(offsets, anchors):
    centers, sizes = _center_form(anchors)
    centers = centers + offsets[..., :2] * VARIANCES[0] * sizes
    sizes = sizes * torch.exp(offsets[..., 2:] * VARIANCES[1])
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)


def multibox_loss(target_offsets, targets, offsets, logits, negative_mask=None):
    """Box and class loss of a stage, with three hard negatives for each positive."""
    positive = targets > 0
    box_loss = F.smooth_l1_loss(offsets[positive], target_offsets[positive], reduction="sum")
    class_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    class_loss = class_loss.view_as(targets)
    candidates = ~positive if negative_mask is None else ~positive & negative_mask
    mining = class_loss.detach().masked_fill(~candidates, -math.inf)
    rank = mining.argsort(dim=1, descending=True).argsort(dim=1)
    hard = candidates & (rank < 3 * positive.sum(dim=1, keepdim=True))
    count = positive.sum().clamp(min=1)
    return box_loss / count, class_loss[positive | hard].sum() / count


def two_stage_loss(outputs, boxes, labels, anchors):
    """The four losses, in the order of `keras_resnest`."""
    outputs = {name: value.float() for name, value in outputs.items()}
    with torch.no_grad():
        arm_targets = encode_targets(boxes, torch.ones_like(labels), anchors)
        refined = decode_boxes(outputs["arm_boxes"], anchors)
        odm_targets = encode_targets(boxes, labels + 1, refined)
        not_easy = outputs["arm_objectness"].softmax(dim=-1)[..., 1] > 0.01
    arm = multibox_loss(*arm_targets, outputs["arm_boxes"], outputs["arm_objectness"])
    odm = multibox_loss(*odm_targets, outputs["odm_boxes"], outputs["odm_logits"], not_easy)
    return [*arm, *odm]
