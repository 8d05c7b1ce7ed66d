"""Runs `keras-resnest` as `python -m keras_resnest`."""

import sys

from keras_resnest.cli import main

if __name__ == "__main__":
    sys.exit(main())
