"""Export of trained models to TensorFlow Serving and other runtimes."""

from keras_resnest.serving.decoder_numpy import NumpyDetectionDecoder
from keras_resnest.serving.export import FORMATS, export_model
from keras_resnest.serving.graph import deployment_function
from keras_resnest.serving.saved_model import export_saved_model

__all__ = [
    "FORMATS",
    "NumpyDetectionDecoder",
    "deployment_function",
    "export_model",
    "export_saved_model",
]
