"""Widths and depths of RegNet, from the linear rule of its authors."""

import math


def regnet_arguments(
    depth: int,
    initial_width: int,
    slope: float,
    multiplier: float,
    group_width: int,
    se_ratio: float = 0.0,
) -> dict:
    """Returns the arguments of `ResNet` that make a RegNet.

    Block `j` has the width `initial_width + slope * j`, rounded first to
    `initial_width * multiplier ** k` with integer `k`, then to a multiple of 8. Blocks of equal
    width form a stage, whose width is finally rounded to a multiple of `group_width`.

    Args:
        depth: positive integer, number of blocks.
        initial_width: positive multiple of 8, width of the first block.
        slope: non-negative float, increase in width per block.
        multiplier: float above 1, ratio of the widths of neighboring stages.
        group_width: positive integer, channels per group of the 3x3 convolutions.
        se_ratio: ratio of hidden channels of squeeze-and-excitation (RegNetY), 0 for none.

    Returns:
        Dict of arguments of `keras_resnest.backbones.ResNet`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> regnet_arguments(13, 24, 36.44, 2.49, 8)["stackwise_num_filters"]
        [24, 56, 152, 368]

    Source: RegNet, https://arxiv.org/abs/2003.13678, section 3.3 and appendix B; RegNetY,
    section 4.
    """
    if depth < 1 or initial_width < 8 or initial_width % 8 or slope < 0 or multiplier <= 1:
        raise ValueError(
            "`depth` must be positive, `initial_width` a positive multiple of 8, `slope` "
            f"non-negative and `multiplier` above 1. Received: depth={depth}, "
            f"initial_width={initial_width}, slope={slope}, multiplier={multiplier}"
        )
    widths = []
    for j in range(depth):
        exponent = round(math.log((initial_width + slope * j) / initial_width, multiplier))
        widths.append(round(initial_width * multiplier**exponent / 8) * 8)
    stages = sorted(set(widths))
    return {
        "stackwise_num_filters": [max(round(w / group_width), 1) * group_width for w in stages],
        "stackwise_num_blocks": [widths.count(width) for width in stages],
        "stackwise_num_strides": [2] * len(stages),
        "expansion": 1,
        "group_width": group_width,
        "se_ratio": se_ratio,
        "se_position": "middle",
        "stem_width": 32,
        "stem_kernel_size": 3,
        "stem_pooling": False,
    }
