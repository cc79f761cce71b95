"""The package's version, in its one place: setup.py, the command line and the docs read it here."""

__version__ = "0.1.0"
