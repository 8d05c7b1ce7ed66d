"""The program `keras-resnest`."""
