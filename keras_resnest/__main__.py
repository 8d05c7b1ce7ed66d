"""`python -m keras_resnest` is the program `keras-resnest`."""

import sys

from keras_resnest.cli import main

if __name__ == "__main__":
    sys.exit(main())
