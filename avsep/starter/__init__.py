"""The model that comes with the package: all 23 objects, learned from open recordings; its card is README.md."""

from pathlib import Path

PATH = str(Path(__file__).parent)
