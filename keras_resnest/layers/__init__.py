"""Layers of ResNeSt, RefineDet and the other networks of this package."""

from keras_resnest.layers.aligned_convolution import AlignedConvolution
from keras_resnest.layers.channel_attention import SelectiveKernel, SqueezeExcitation
from keras_resnest.layers.channel_shuffle import ChannelShuffle
from keras_resnest.layers.convolution import DepthwiseConv2D, GroupedConv2D
from keras_resnest.layers.l2_normalization import L2Normalization
from keras_resnest.layers.normalization import BatchNormalization
from keras_resnest.layers.regularization import DropBlock2D
from keras_resnest.layers.split_attention import RadixSoftmax, SplitAttention
from keras_resnest.layers.transfer_connection import TCB, TransferConnectionBlock

__all__ = [
    "TCB",
    "AlignedConvolution",
    "BatchNormalization",
    "ChannelShuffle",
    "DepthwiseConv2D",
    "DropBlock2D",
    "GroupedConv2D",
    "L2Normalization",
    "RadixSoftmax",
    "SelectiveKernel",
    "SplitAttention",
    "SqueezeExcitation",
    "TransferConnectionBlock",
]
